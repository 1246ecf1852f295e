"""Sweeps: grids, array scripts, what a rerun submits; on a stand-in for PBS, and the commands of a local one."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_cpt.cli import main
from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.errors import ConfigError, LaunchError
from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.queue import ALIVE
from megatron_cpt.launch.scheduler.render import render_job
from megatron_cpt.launch.submission.grid import grid_points, parse_grid
from megatron_cpt.launch.submission.submit import Submission, job_of
from megatron_cpt.launch.submission.sweep import Sweep, array_work, point_table, sweep_submission
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import read_jobs
from tests.cluster import pbs_stand_in
from tests.cluster.conftest import PARAMS
from tests.launch.test_render import GOLDEN, check_directives, submission, without_package_path

TRAINING = """
import json, os, sys
from pathlib import Path
from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.run.directory import run_dir
words = sys.argv[1:]
at = {words[index]: words[index + 1] for index in range(0, 10, 2)}
config = load_config(Path(at["--task"]), at["--params"], at["--size"], at["--variant"], at["--site"], words[10:]).config
if os.environ["RANK"] != "0":
    sys.exit(0)
run = run_dir(config)
marker = run.path / "failed_once"
if config.optimizer.lr > 1.5e-3 and not marker.exists():
    run.path.mkdir(parents=True, exist_ok=True)
    marker.touch()
    sys.exit(7)
learned = -config.optimizer.lr * 100
records = [{"kind": "start", "iteration": 0, "resumed": False}]
for iteration in (0, 40):
    for corpus, change in (("D0", config.data.mix["D1"]), ("D1", learned)):
        value = 2.0 + (change if iteration else 0)
        records.append({"kind": "validation", "iteration": iteration, "consumed_tokens": 0, "corpus": corpus,
                        "loss": value, "bits_per_byte": value})
records.append({"kind": "train", "iteration": 40, "consumed_tokens": 9, "loss": 2.0, "lr": 1.0})
run.metrics_path.write_text("".join(json.dumps(record) + "\\n" for record in records))
run.checkpoints.mkdir(exist_ok=True)
(run.checkpoints / "latest_checkpointed_iteration.txt").write_text("40")
"""


def test_a_grid_is_every_combination_and_commas_inside_brackets_belong_to_a_value():
    grid = parse_grid(["data.mix={D0: 0.1, D1: 0.9},{D0: 0.2, D1: 0.8}", "optimizer.lr=1e-3,2e-3"])
    assert grid["data.mix"] == ["{D0: 0.1, D1: 0.9}", "{D0: 0.2, D1: 0.8}"]
    points = grid_points(grid, submission(CHECKOUT / "slurm/sites/generic.yaml").loaded.config, ())
    assert [point.label for point in points][:2] == ["mix-D0-0.1-D1-0.9_lr-0.001", "mix-D0-0.1-D1-0.9_lr-0.002"]
    assert points[3].settings == {"data.mix": "{D0: 0.2, D1: 0.8}", "optimizer.lr": "2e-3"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["lr=1,2"], "--grid lr=1,2: no axis"),
        (["optimizer.lr="], "no axis"),
        (["optimizer.lr=1e-3", "optimizer.lr=2e-3"], "stated twice"),
        (["launch.nodes=1,2"], "the same for all points of an array"),
        (["training.seed=" + ",".join(map(str, range(65)))], "65 points. Between 1 and 64"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_grid(grid)


@pytest.mark.parametrize("scheduler", ["pbs", "slurm"])
def test_the_array_of_a_sweep_equals_its_golden_file_and_passes_the_strict_parser(scheduler):
    base = submission(CHECKOUT / scheduler / "sites" / "generic.yaml")
    points = grid_points(parse_grid(["optimizer.lr=1e-4,3e-4"]), base.loaded.config, ())
    sweep = Sweep(submission=sweep_submission(base, "sweep"), points=points, submissions=[base, base], old=())
    job, table = job_of(sweep.submission, array_work(sweep, [0, 1])), point_table(sweep, [0, 1])
    text = without_package_path(render_job(job, scheduler))
    path = GOLDEN / f"{scheduler}-generic-sweep.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "run the tests with UPDATE_GOLDEN=1 and look at the difference"
    check_directives(text, scheduler)
    subprocess.run(["bash", "-n", "-c", text], check=True)
    assert table[1]["train_iters"] == 1000 and table[1]["arguments"][:2] == ["--task", "tasks/ja"]
    small = LoadedConfig(base.loaded.config, {})
    assert small.config.variant == "main" and sweep.submission.run.path.name == "main+sweep"
    limited = sweep_submission(base, "sweep")
    object.__setattr__(limited.site, "max_array_tasks", 1)
    with pytest.raises(LaunchError, match="2 points. The site allows 1 array tasks"):
        array_work(Sweep(submission=limited, points=points, submissions=[base, base], old=()), [0, 1])


@pytest.fixture
def task(tmp_path) -> Path:
    """A task with two variants whose data is never looked at."""
    folder = tmp_path / "tasks" / "t"
    folder.mkdir(parents=True)
    corpus = {"tokens": ["x"], "validation": ["y"]}
    (folder / "task.yaml").write_text(
        yaml.safe_dump(
            {
                "paths": {"runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path)},
                "data": {"tokenizer": "tokenizer", "corpora": {"D0": corpus, "D1": corpus}},
                "evaluation": {"eval_interval": 20},
                "sizes": {"S": {"training": {"train_iters": 40}}},
                "variants": {"base": {"data": {"mix": {"D0": 1}}}, "main": {"data": {"mix": {"D0": 0.1, "D1": 0.9}},
                             "init": {"from_path": "variant:base"}}},
            }
        )
    )  # fmt: skip
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (tmp_path / "site.yaml").write_text(
        yaml.safe_dump(
            {
                "launch": {"scheduler": "pbs", "nodes": 1, "gpus_per_node": 1, "walltime": 300},
                "site": {"queue": "workq", "processes": "rank",
                         "launcher": "mpirun -n {processes} --hostfile {hostfile}"},
            }
        )
    )  # fmt: skip
    return folder


@pytest.fixture
def pbs(tmp_path, monkeypatch):
    """The stand-in for PBS on PATH, with an mpirun for this machine."""
    from tests.cluster.test_pbs_stand_in import MPIRUN

    directory = tmp_path / "pbs"
    commands = pbs_stand_in.install(directory)
    (commands / "mpirun").write_text(MPIRUN.replace("assert len(set(hosts)) == 2, hosts", ""))
    (commands / "mpirun").chmod(0o755)
    monkeypatch.setattr(pbs_stand_in, "ROOT", directory)
    monkeypatch.setenv("PBS_STAND_IN", str(directory))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    return commands


def submit_here(task: Path, *words: str) -> list[str]:
    """Submit as the verb does, in this process, with a stand-in for training; return the ids."""
    root = task.parents[1]
    arguments = ["--task", str(task), "--params", str(root / "params.yaml"), "--size", "S", "--variant", "main"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
        main(["submit", "sweep", *words, *arguments, "--site", str(root / "site.yaml")])
    assert not ended.value.code, output.getvalue()
    return output.getvalue().split("\n")[:-1]


@pytest.mark.full
def test_a_sweep_is_an_array_with_a_report_and_a_rerun_submits_what_is_missing(task, pbs, monkeypatch):
    stand_in_for_training(task.parents[1], monkeypatch)
    shown = run_sweep_with_a_failing_point(task, "pbs")
    assert "#PBS -J 0-1" in shown and "depend=afterany:<sweep>" in shown.replace("'", "")


def stand_in_for_training(root: Path, monkeypatch) -> None:
    """Let jobs run a second's stand-in for `megatron-cpt train`; everything else runs as it is."""
    program, python = root / "training.py", root / "python"
    program.write_text(TRAINING)
    python.write_text(
        f'#!/bin/bash\n[[ "$*" == "-m megatron_cpt train "* ]] && exec {sys.executable} {program} "${{@:4}}"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    defaults = Submission.__init__.__kwdefaults__ | {"python": str(python)}
    monkeypatch.setattr(Submission.__init__, "__kwdefaults__", defaults)
    monkeypatch.setattr("megatron_cpt.launch.submission.sweep.check_training", lambda *_, **__: None)


def run_sweep_with_a_failing_point(task: Path, scheduler: str) -> str:
    """Submit two points of which one fails at first, then again what is missing; return what a dry run showed."""
    grid = ["--grid", "replay=0.5", "--grid", "optimizer.lr=1e-3,2e-3"]
    runs = task.parents[1] / "runs/t/params/S"
    shown = "\n".join(submit_here(task, *grid, "--dry-run"))
    assert not runs.exists() and "# replay-0.5_lr-0.001: --task" in shown
    array, report = submit_here(task, *grid)
    assert submit_here(task, *grid) == [], "all points and the report are queued or running"
    wait(scheduler, array, report)
    jobs = [
        read_jobs(runs / f"main+replay-0.5_lr-{lr}" / "jobs")[f"{array}/{index}"]
        for index, lr in enumerate((0.001, 0.002))
    ]
    assert [job["state"] for job in jobs] == ["finished", "failed"], logs(runs)
    page = (runs / "main+sweep/report/sweep.md").read_text()
    assert "0 of 40" in page and "| * |" in page, page

    again, report = submit_here(task, *grid)
    assert read_jobs(RunDir(runs / "main+sweep").jobs)[again]["points"] == ["replay-0.5_lr-0.002"]
    wait(scheduler, again, report)
    points = json.loads((runs / "main+sweep/report/sweep.json").read_text())["points"]
    assert [point["is_finished"] for point in points] == [True] * 2, logs(runs)
    assert [round(point["learned"], 3) for point in points] == [-0.1, -0.2]
    assert [round(point["forgot"], 3) for point in points] == [0.5, 0.5]
    assert [point["is_front"] for point in points] == [False, True]
    assert submit_here(task, *grid) == []
    return shown


def wait(scheduler: str, *ids: str) -> None:
    deadline = time.monotonic() + 100
    while any(state.state in ALIVE for state in scheduler_of(scheduler).states(ids).values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def logs(runs: Path) -> str:
    return "".join(
        f"== {path}\n{path.read_text()[-2000:]}" for path in sorted(runs.rglob("*")) if path.suffix in (".log", ".out")
    )


def test_a_local_sweep_shows_its_commands_and_wants_held_out_losses(task):
    root = task.parents[1]
    command = [sys.executable, "-m", "megatron_cpt", "submit", "sweep", "--task", str(task), "--size", "S"]
    command += ["--params", str(root / "params.yaml"), "--grid", "replay=0.05,0.25", "--old", "D0"]

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)

    refused = call("evaluation.eval_interval=0")
    assert refused.returncode == 2 and "A sweep compares held-out losses" in refused.stderr
    refused = call("--grid", "replay=2")
    assert refused.returncode == 2 and "stated twice" in refused.stderr
    refused = call("--dry-run")
    assert refused.returncode == 2 and "Train base first" in refused.stderr, refused.stderr
