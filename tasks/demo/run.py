"""The whole way, once, on real text: `make demo` runs this list of steps and prints each command before it runs it.

    python -m tasks.demo.run [--size 300K] [--clean]

What has been done already is passed over, so an interrupted demo continues where it stopped. Everything is written below
`runs/demo`. The commands are the ones that a cluster runs, with another site and another params file.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.config.settings.derived import train_iters
from tasks.mini.steps import (
    ROOT,
    Command,
    Step,
    cpt,
    exists,
    has_trained,
    is_finished,
    python,
    run_and_kill,
    run_steps,
    say,
    step,
)

DEMO = Path("runs/demo")
DATA, MODELS, REPORT = DEMO / "data", DEMO / "models", DEMO / "report"
RESULTS = DEMO / "evaluation" / "forgetting.json"
PARAMS = "demo-5m"
KILL_AT_FRACTION = 0.6
FIRST_LAYOUT = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
SECOND_LAYOUT = ("parallel.pipeline_model_parallel_size=2",)


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
    run_steps(steps(arguments.size))
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


def run_of(size: str, variant: str) -> Command:
    """Return the arguments that name a run of the demo."""
    return ["--task", "tasks/demo", "--params", PARAMS, "--size", size, "--variant", variant]


def documents() -> list[Path]:
    """Return the document files that the first step writes."""
    return [DATA / f"{name}.jsonl.zst" for name in ("D0", "D0.validation", "D1", "D1.validation")]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("The demo was interrupted. Rerun `make demo` to continue.")
