"""One function says what state a job is in; a machine of random events never breaks what must always hold."""

import contextlib
import dataclasses
import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.job import Dependency
from megatron_cpt.launch.scheduler.queue import ALIVE, JobState, NotKnown, Scheduler
from megatron_cpt.launch.scheduler.states import job_states, joined
from megatron_cpt.launch.submission import executor as executors
from megatron_cpt.launch.submission.chain import link_condition
from megatron_cpt.launch.submission.executor import after_of, executor_of
from megatron_cpt.launch.submission.graph import current_stages
from megatron_cpt.launch.submission.work import Link, Work
from megatron_cpt.run.intents import open_intents
from megatron_cpt.run.ledger import append_record, read_jobs
from megatron_cpt.run.made_of import fingerprint
from tests.launch.test_render import CHECKOUT, submission

LIVE = ("queued", "held", "running")
ENDED = ("finished", "failed", "cancelled")


@pytest.mark.parametrize(
    ("ledger", "seen", "state", "is_news"),
    [
        ("submitted", "queued", "queued", False),
        ("submitted", "held", "held", False),
        ("submitted", "running", "running", False),
        ("submitted", "finished", "finished", True),
        ("submitted", "failed", "failed", True),
        ("submitted", "cancelled", "cancelled", True),
        ("submitted", "gone", "lost", True),
        ("submitted", "unknown", "unknown", False),
        ("running", "running", "running", False),
        ("running", "queued", "requeued", False),
        ("running", "held", "requeued", False),
        ("running", "finished", "finished", True),
        ("running", "failed", "failed", True),
        ("running", "cancelled", "cancelled", True),
        ("running", "gone", "lost", True),
        ("running", "unknown", "unknown", False),
        *((ended, seen, ended, False) for ended in ("finished", "stopped", "failed", "cancelled", "lost")
          for seen in (*ENDED, "gone", "unknown")),
        *((ended, seen, seen, False) for ended in ("finished", "stopped", "failed", "cancelled", "lost")
          for seen in LIVE),
    ],
)  # fmt: skip
def test_the_table_of_states(ledger, seen, state, is_news):
    assert joined(ledger, JobState(seen)) == (state, is_news)


class Fake(Scheduler):
    """A scheduler in memory: it may lose answers, stop answering, forget jobs, and it honours conditions."""

    name, commands, consequence = "slurm", (), ""

    def __init__(self):
        self.jobs: dict[str, dict] = {}
        self.answers = True
        self.loses_answer = False
        self.numbers = itertools.count(1)
        self.when_started = lambda name: None

    def check_commands(self) -> None:
        pass

    def submit_command(self, script, dependencies):
        return ["sbatch", str(script)]

    def job_name(self, wanted, unique):
        return f"{wanted}-{unique}"

    def printed_id(self, output):
        return output

    def submit(self, script, dependencies, name):
        if not self.answers:
            raise NotKnown("no answer")
        job = str(next(self.numbers))
        self.jobs[job] = {"state": "queued", "name": name, "after": tuple(dependencies)}
        if self.loses_answer:
            raise NotKnown("lost")
        return job

    def named(self, name):
        return [job for job, fields in self.jobs.items() if fields["name"] == name] if self.answers else None

    def states(self, ids):
        if not self.answers:
            return dict.fromkeys(ids, JobState("unknown"))
        return {job: JobState(self.jobs[job]["state"] if job in self.jobs else "gone") for job in ids}

    def cancel(self, ids):
        for job in ids:
            if self.jobs.get(job, {}).get("state") in ALIVE:
                self.jobs[job]["state"] = "cancelled"

    def settle(self) -> None:
        """Start what may start, delete what never can."""
        for _ in range(len(self.jobs) + 1):
            for fields in self.jobs.values():
                if fields["state"] == "queued":
                    verdict = self._verdict(fields["after"])
                    fields["state"] = {None: "queued", True: "running", False: "cancelled"}[verdict]
                    if verdict:
                        self.when_started(fields["name"])

    def _verdict(self, after: tuple[Dependency, ...]) -> bool | None:
        waits = False
        for dependency in after:
            for parent in dependency.ids:
                state = self.jobs[parent]["state"]
                if state in ALIVE:
                    waits = True
                elif dependency.kind == "afterok" and state != "finished":
                    return False
        return None if waits else True


class Pipeline(RuleBasedStateMachine):
    """tokenize -> train (a chain) -> convert-out, submitted again and again while jobs end, fail, vanish and answers are lost."""

    @initialize(are_tokens_made=st.booleans(), links=st.integers(1, 3))
    def begin(self, are_tokens_made, links):
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        base = submission(CHECKOUT / "slurm/sites/generic.yaml")
        config = dataclasses.replace(
            base.loaded.config, paths=dataclasses.replace(base.loaded.config.paths, runs_dir=str(root))
        )
        self.fake = Fake()
        self.base = dataclasses.replace(base, loaded=dataclasses.replace(base.loaded, config=config), work_dir=root)
        self.stamps = itertools.count(1)
        self.documents = root / "documents"
        self.documents.write_text("0")
        self.tokens = root / "tokens"
        self.exports = root / "exports"
        self.run = self.base.run
        self.started_badly: list[str] = []
        self.fake.when_started = self.check_start
        if are_tokens_made:
            self.submit(links)
            self.fake.settle()
            self._finish(next(job for job, fields in self.fake.jobs.items() if fields["state"] == "running"))

    def check_start(self, name: str) -> None:
        is_trained = (self.run.checkpoints / "latest_checkpointed_iteration.txt").exists()
        are_whole = self.tokens.exists() and self.tokens.read_text() == self.documents.read_text()
        if ("-train-" in name and not are_whole and not is_trained) or ("-convert-" in name and not is_trained):
            self.started_badly.append(name)

    def stages(self) -> list[Work]:
        reads, writes = (str(self.documents),), (str(self.tokens),)
        return [
            Work(name="tokenize", stage="tokenize", words=("tokenize",), reads=reads, writes=writes),
            Work(
                name="train", stage="train", words=("train",), on_ranks=True, link=Link(number=1), needs=("tokenize",)
            ),
            Work(
                name="convert-out", stage="convert", words=("convert",), needs=("train",), writes=(str(self.exports),)
            ),
        ]

    def submit(self, links: int) -> list[str]:
        """Do what `submit pipeline` does between its lock and its end."""
        from megatron_cpt.launch.submission import pipeline

        own = dataclasses.replace(self.base, stamp=f"s{next(self.stamps)}")
        executor = executor_of(own)
        executor.scheduler = self.fake
        executor.begin()
        stages = self.stages()
        return list(pipeline._submit(executor, stages, current_stages(own, stages), links, 2, []).ids)

    @rule(links=st.integers(1, 3), loses=st.booleans())
    def command(self, links, loses):
        before = {job for job, fields in self.fake.jobs.items() if fields["state"] in ALIVE}
        self.fake.loses_answer = loses
        with contextlib.suppress(LaunchError):
            self.submit(links)
        self.fake.loses_answer = False
        if not self.fake.answers:
            assert {job for job, fields in self.fake.jobs.items() if fields["state"] in ALIVE} == before

    @rule(links=st.integers(1, 3))
    @precondition(lambda self: self.fake.answers)
    def the_same_command_twice_submits_nothing_more(self, links):
        self.submit(links)
        taken = set(self.fake.jobs)
        assert self.submit(links) == [] and set(self.fake.jobs) == taken

    @rule(answers=st.booleans())
    def server(self, answers):
        self.fake.answers = answers

    @rule(outcome=st.sampled_from(["finished", "failed", "cancelled", "vanished", "saved"]), data=st.data())
    def a_running_job_ends(self, outcome, data):
        self.fake.settle()
        running = sorted(job for job, fields in self.fake.jobs.items() if fields["state"] == "running")
        if not running:
            return
        job = data.draw(st.sampled_from(running))
        record = read_jobs(self.run.jobs).get(job, {})
        name = str(record.get("name") or self.fake.jobs[job]["name"])
        stage = next((stage for stage in self.stages() if stage.name == name or f"-{stage.stage}-" in name), None)
        assert stage is not None, name
        unique = {"job_name": self.fake.jobs[job]["name"]}
        append_record(self.run.jobs, job, state="running", inputs=fingerprint(stage.reads, stage.words), **unique)
        if outcome == "finished":
            if stage.name == "tokenize":
                self.tokens.write_text(self.documents.read_text())
            elif stage.link is not None:
                self.run.checkpoints.mkdir(parents=True, exist_ok=True)
                (self.run.checkpoints / "latest_checkpointed_iteration.txt").write_text("1000000")
            else:
                self.exports.write_text("x")
        if outcome in ("finished", "failed"):
            made = {"outputs": fingerprint(stage.writes)} if outcome == "finished" else {}
            append_record(self.run.jobs, job, state=outcome, exit_code=0 if outcome == "finished" else 1, **made)
        if outcome == "saved" and stage.link is not None:
            append_record(self.run.jobs, job, state="stopped", exit_code=0)
        self.fake.jobs[job]["state"] = {"vanished": "failed", "saved": "failed"}.get(outcome, outcome)

    @rule(data=st.data())
    def a_waiting_job_is_cancelled(self, data):
        waiting = sorted(job for job, fields in self.fake.jobs.items() if fields["state"] == "queued")
        if waiting:
            self.fake.cancel([data.draw(st.sampled_from(waiting))])

    @rule()
    @precondition(lambda self: not (self.run.checkpoints / "latest_checkpointed_iteration.txt").exists())
    def documents_are_appended_while_nothing_is_queued(self):
        if not any(fields["state"] in ALIVE for fields in self.fake.jobs.values()):
            self.documents.write_text(self.documents.read_text() + "+")

    @rule()
    def status(self):
        before = {job: record.get("state") for job, record in read_jobs(self.run.jobs).items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_cpt.launch.scheduler.states.scheduler_of", lambda name: self.fake)
            states = job_states(self.run)
        after = {job: record.get("state") for job, record in read_jobs(self.run.jobs).items()}
        assert "unknown" not in after.values(), "no answer is never written down"
        if not self.fake.answers:
            assert after == before
        for job, state in states.items():
            if self.fake.answers and self.fake.jobs[job]["state"] in ALIVE:
                assert state.state in (*ALIVE, "requeued")

    @invariant()
    def never_two_live_trainings(self):
        if hasattr(self, "fake"):
            self.fake.settle()
            trainings = [f for f in self.fake.jobs.values() if "-train-" in f["name"] and f["state"] == "running"]
            assert len(trainings) <= 1

    @invariant()
    def never_a_stage_of_unfinished_parents(self):
        if hasattr(self, "fake"):
            assert not self.started_badly

    @invariant()
    def no_job_is_unknown_to_the_ledger_once_intents_are_settled(self):
        if hasattr(self, "fake") and not open_intents(self.run.jobs):
            assert set(self.fake.jobs) <= set(read_jobs(self.run.jobs))

    def teardown(self):
        """Whatever happened: the same command, again and again, reaches the finished graph."""
        if not hasattr(self, "fake"):
            return
        self.fake.answers = True
        for _ in range(12):
            self.submit(1)
            self.fake.settle()
            for job, fields in list(self.fake.jobs.items()):
                if fields["state"] == "running":
                    self._finish(job)
            stages = self.stages()
            if current_stages(self.base, stages) == {stage.name for stage in stages}:
                break
        assert current_stages(self.base, self.stages()) == {"tokenize", "train", "convert-out"}
        self.folder.cleanup()

    def _finish(self, job):
        name = self.fake.jobs[job]["name"]
        stage = next(stage for stage in self.stages() if f"-{stage.stage}-" in name)
        append_record(self.run.jobs, job, state="running", inputs=fingerprint(stage.reads, stage.words))
        if stage.name == "tokenize":
            self.tokens.write_text(self.documents.read_text())
        elif stage.link is not None:
            self.run.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.run.checkpoints / "latest_checkpointed_iteration.txt").write_text("1000000")
        else:
            self.exports.write_text("x")
        append_record(self.run.jobs, job, state="finished", exit_code=0, outputs=fingerprint(stage.writes))
        self.fake.jobs[job]["state"] = "finished"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(executors, "_SETTLE_SECONDS", 0.0)


Pipeline.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPipeline = pytest.mark.slow(Pipeline.TestCase)


def test_conditions_of_links():
    first = (Dependency("afterok", ("9",)),)
    assert link_condition([], [], first) == first and link_condition([], ["1"], first) == (
        Dependency("afterok", ("1",)),
    )
    assert link_condition(["2", "3"], ["1"], ()) == (Dependency("afterok", ("1",)), Dependency("afterany", ("2", "3")))
    assert after_of([], first) == first
