"""The whole way, once, on real text: `make demo` runs this list of steps and prints each command before it runs it.

    python tasks/demo/run.py [--size 300K] [--clean]

What has been done already is passed over, so an interrupted demo continues where it stopped. Everything is written below
`runs/demo`. The commands are the ones that a cluster runs, with another site and another params file.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_cpt.config.derived import train_iters
from megatron_cpt.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path("runs/demo")
DATA, MODELS, REPORT = DEMO / "data", DEMO / "models", DEMO / "report"
RESULTS = DEMO / "evaluation" / "forgetting.json"
PARAMS = "demo-5m"
KILL_AT_FRACTION = 0.6
FIRST_LAYOUT = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
SECOND_LAYOUT = ("parallel.pipeline_model_parallel_size=2",)

Command = list[str]


@dataclass(frozen=True)
class Step:
    """Commands of which `is_done` says whether they still have to run."""

    title: str
    commands: list[Command]
    is_done: Callable[[], bool]
    run: Callable[[Command], None]


def main() -> None:
    """Run the steps that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="300K", help="a size of tasks/demo/task.yaml")
    parser.add_argument("--clean", action="store_true", help="remove runs/demo first")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.clean:
        shutil.rmtree(DEMO, ignore_errors=True)
    started = time.monotonic()
    for number, step in enumerate(steps(arguments.size), 1):
        done = step.is_done()
        say(f"\n== {number}. {step.title}{' (done already)' if done else ''}")
        if not done:
            begun = time.monotonic()
            for command in step.commands:
                step.run(command)
            say(f"   {time.monotonic() - begun:.0f} s")
    say(f"\nAll done in {time.monotonic() - started:.0f} s. Read {REPORT}/report.md; the models are in {MODELS}.")
    say((DEMO / "evaluation" / "forgetting.md").read_text(encoding="utf-8"))


def steps(size: str) -> list[Step]:
    """Return the demo as a list: what is run, in which order, and what shows that it is done."""
    runs = DEMO / PARAMS / size
    variants = ("base", "replay", "no-replay")
    iterations = {
        variant: train_iters(load_config(Path("tasks/demo"), PARAMS, size, variant).config.training)
        for variant in variants
    }
    kill_at = int(KILL_AT_FRACTION * iterations["replay"])
    exported = {variant: runs / variant / "checkpoints_hf" / f"iter_{iterations[variant]:07d}" for variant in variants}
    evaluated = {
        **exported,
        "soup": MODELS / "soup",
        "soup-with-base": MODELS / "soup-with-base",
    }
    soup = cpt("soup", *run_of(size, "replay"), "--last", 3, "--method", "linear")
    texts = {name: DATA / f"{name}.validation.jsonl.zst" for name in ("D0", "D1")}
    return [
        step(
            "Documents: prose (D0), Python source (D1), held-out parts, a tokenizer of 8,192 pieces",
            [python("tasks/demo/make_corpora.py", DATA)],
            exists(DATA / "tokenizer"),
        ),
        step(
            "Tokens: .bin/.idx files that Megatron reads",
            [
                cpt(
                    *("tokenize", "--input", *documents()),
                    *("--tokenizer", DATA / "tokenizer", "--output-dir", DATA / "tokens"),
                )
            ],
            exists(*(DATA / "tokens" / f"{name}_text_document.json" for name in ("D0.validation", "D1.validation"))),
        ),
        step(
            "Lists: what each stage takes from each corpus, and how many iterations that makes",
            [cpt("blend", "plan", *run_of(size, variant)) for variant in variants],
            lambda: is_finished(runs / "replay"),
        ),
        step(
            "Base: a Hugging Face model with random weights",
            [python("tasks/demo/make_base.py", "tasks/demo", PARAMS, size, "base", MODELS / "base-hf")],
            exists(MODELS / "base-hf"),
        ),
        step(
            "Base: converted to a Megatron checkpoint",
            [cpt("convert", "hf-to-mcore", MODELS / "base-hf", MODELS / "base-mcore", "--params", PARAMS, "--verify")],
            exists(MODELS / "base-mcore" / "latest_checkpointed_iteration.txt"),
        ),
        step(
            "Base: trained on D0, DP2, up to where a cooldown would begin",
            [cpt("submit", "train", *run_of(size, "base"))],
            lambda: is_finished(runs / "base"),
        ),
        step(
            "CPT: D1 with a tenth of D0, on TP2 with sequence parallelism; a rank is killed (SIGKILL) on the way",
            [cpt("submit", "train", *run_of(size, "replay"), *FIRST_LAYOUT)],
            lambda: has_trained(runs / "replay", kill_at),
            run=lambda command: run_and_kill(command, runs / "replay", kill_at),
        ),
        step(
            "CPT: the same command continues from the last checkpoint, now as PP2",
            [cpt("submit", "train", *run_of(size, "replay"), *SECOND_LAYOUT)],
            lambda: is_finished(runs / "replay"),
        ),
        step(
            "CPT: the same stage without replay",
            [cpt("submit", "train", *run_of(size, "no-replay"))],
            lambda: is_finished(runs / "no-replay"),
        ),
        step(
            "Out: checkpoints become Hugging Face folders",
            [
                cpt("convert", "latest", *run_of(size, "base")),
                cpt("convert", "all", *run_of(size, "replay")),
                cpt("convert", "latest", *run_of(size, "no-replay")),
            ],
            exists(*exported.values()),
        ),
        step(
            "Out: the exported model and the Megatron checkpoint have the same weights and give the same logits",
            [cpt("convert", "verify", exported["replay"], runs / "replay" / "checkpoints", "--logits")],
            exists(MODELS / "soup"),  # no soup without this
        ),
        step(
            "Soup: the last three checkpoints averaged",
            [[*soup, "--output", str(MODELS / "soup")]],
            exists(MODELS / "soup"),
        ),
        step(
            "Soup: the last three checkpoints and the base averaged",
            [[*soup, "--base", str(exported["base"]), "--output", str(MODELS / "soup-with-base")]],
            exists(MODELS / "soup-with-base"),
        ),
        step(
            "Evaluation: bits per byte on held-out text, what was learned and what forgotten",
            [
                cpt(
                    *("evaluate", "forgetting"),
                    *(part for name, path in evaluated.items() for part in ("--model", f"{name}={path}")),
                    *(part for name, path in texts.items() for part in ("--text", f"{name}={path}")),
                    *("--output", DEMO / "evaluation"),
                )
            ],
            exists(RESULTS),
        ),
        step(
            "Report: curves, blend, and the table as a chart",
            [
                cpt(
                    *("report", *(runs / variant for variant in variants)),
                    *("--evaluation", RESULTS, "--output", REPORT),
                )
            ],
            exists(REPORT / "report.md"),
        ),
    ]


def step(
    title: str, commands: list[Command], is_done: Callable[[], bool], run: Callable[[Command], None] | None = None
) -> Step:
    """Return a step; its commands run one after the other unless `run` says how."""
    return Step(title, commands, is_done, run or run_command)


def cpt(*arguments: object) -> Command:
    """Return a megatron-cpt command."""
    return ["megatron-cpt", *map(str, arguments)]


def python(*arguments: object) -> Command:
    """Return a command for this interpreter."""
    return ["python", *map(str, arguments)]


def run_of(size: str, variant: str) -> Command:
    """Return the arguments that name a run of the demo."""
    return ["--task", "tasks/demo", "--params", PARAMS, "--size", size, "--variant", variant]


def documents() -> list[Path]:
    """Return the document files that the first step writes."""
    return [DATA / f"{name}.jsonl.zst" for name in ("D0", "D0.validation", "D1", "D1.validation")]


def exists(*paths: Path) -> Callable[[], bool]:
    """Return a check that all of `paths` exist."""
    return lambda: all(path.exists() for path in paths)


def records(run: Path) -> list[dict]:
    """Return the complete records of a run's metrics, oldest first."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def has_trained(run: Path, iteration: int) -> bool:
    """Return whether a run ever came to `iteration`."""
    return any(record["kind"] == "train" and record["iteration"] >= iteration for record in records(run))


def is_finished(run: Path) -> bool:
    """Return whether a run wrote that it came to its planned end."""
    return any(record["kind"] == "end" and record["reason"] == "finished" for record in records(run)[-1:])


def run_command(command: Command) -> None:
    """Print and run a command; end the demo with its exit code when it fails."""
    code = wait_for(start(command))
    if code:
        sys.exit(f"The demo stopped: that command ended with exit code {code}. Rerun `make demo` to continue.")


def run_and_kill(command: Command, run: Path, iteration: int) -> None:
    """Run a training command, kill one of its ranks at `iteration`, and check that the whole job ends because of it."""
    job = start(command)
    was_killed = False
    while job.poll() is None:
        trained = [record for record in records(run) if record["kind"] == "train"]
        if trained and trained[-1]["iteration"] >= iteration:
            rank = rank_process(job.pid)
            say(f"+ kill -KILL {rank.pid}   # rank 1 of the job, after iteration {trained[-1]['iteration']}")
            rank.kill()
            was_killed = True
            break
        time.sleep(0.2)
    code = wait_for(job)
    if not was_killed:
        sys.exit(f"The demo stopped: that command ended with exit code {code}. Rerun `make demo` to continue.")
    if code == 0:
        sys.exit("The demo stopped: a training job that lost a rank ended with exit code 0.")
    say(f"   the job ended with exit code {code}, as it must")


def rank_process(job: int) -> psutil.Process:
    """Return rank 1 among the processes that the job `job` started."""
    return next(child for child in psutil.Process(job).children(recursive=True) if child.environ().get("RANK") == "1")


def start(command: Command) -> subprocess.Popen:
    """Print a command and start it, with the programs of this interpreter's environment."""
    say(f"+ {shlex.join(command)}")
    program = {"python": [sys.executable], "megatron-cpt": [sys.executable, "-m", "megatron_cpt"]}[command[0]]
    return subprocess.Popen([*program, *command[1:]], env={**os.environ, "PYTHONPATH": str(ROOT)})


def wait_for(job: subprocess.Popen) -> int:
    """Return a command's exit code; when the demo is interrupted, let the command end in order first (Ctrl-C reaches both)."""
    try:
        return job.wait()
    except KeyboardInterrupt:
        job.wait()
        raise


def say(text: str) -> None:
    """Print at once, in order with what the commands print."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("The demo was interrupted. Rerun `make demo` to continue.")
