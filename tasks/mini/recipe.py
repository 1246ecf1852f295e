"""A recipe's small form: the names of its files and runs, the base model it starts from, and its command line.

A recipe's `mini.py` states its steps as a function of a Recipe and calls `main`. Everything is written below `runs/<task>` and
`runs/mini` of the current folder; the short form, for tests, into `runs/short`.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.config.settings.derived import train_iters
from tasks.mini.steps import (
    ROOT,
    Command,
    Step,
    cpt,
    exists,
    is_finished,
    python,
    records,
    require,
    run_steps,
    say,
    step,
)

TEXTS = Path("runs/mini/data")
MODELS = Path("runs/mini/models")
BASE_HF = MODELS / "base-hf"
TOKENIZER = TEXTS / "tokenizer"
SHORT_ITERATIONS = 4
SHORT_DIRECTORY = "runs/short"


@dataclass(frozen=True)
class Recipe:
    """Where a recipe's files and runs are, and how its commands name them."""

    task: str
    params: str
    """A params file: its path, or a name in the task's params/."""
    size: str = "mini"
    short: bool = False

    @property
    def folder(self) -> Path:
        """Return the folder of everything that the recipe writes."""
        return Path("runs") / self.task

    @property
    def data(self) -> Path:
        """Return the folder of documents and tokens."""
        return self.folder / "data"

    @property
    def models(self) -> Path:
        """Return the folder of converted and merged models."""
        return self.folder / "models"

    @property
    def evaluation(self) -> Path:
        """Return the folder of forgetting tables."""
        return self.folder / "evaluation"

    def run(self, variant: str) -> Path:
        """Return the directory of a run."""
        return self.folder / Path(self.params).stem / self.size / variant

    def named(self, variant: str) -> Command:
        """Return the arguments that name a run."""
        return ["--task", f"tasks/{self.task}", "--params", self.params, "--size", self.size, "--variant", variant]

    def overrides(self) -> list[str]:
        """Return the settings that make a run short; none in the mini itself."""
        return [f"training.train_iters={SHORT_ITERATIONS}", "checkpoint.save_interval=1"] if self.short else []

    def iterations(self, variant: str) -> int:
        """Return the iterations of a run."""
        task = ROOT / "tasks" / self.task
        return train_iters(
            load_config(task, self.params, self.size, variant, overrides=self.overrides()).config.training
        )

    def exported(self, variant: str, iteration: int | None = None) -> Path:
        """Return the Hugging Face folder of a run's checkpoint, the last one by default."""
        iteration = self.iterations(variant) if iteration is None else iteration
        return self.run(variant) / "checkpoints_hf" / f"iter_{iteration:07d}"

    def train(self, title: str, *variants: str, settings: Iterable[str] = ()) -> Step:
        """Return the step that trains runs, one after the other."""
        settings = [*self.overrides(), *settings]
        return step(
            title,
            [cpt("submit", "train", *self.named(variant), *settings) for variant in variants],
            lambda: all(is_finished(self.run(variant)) for variant in variants),
        )

    def export(self, title: str, *variants: str, every: bool = False) -> Step:
        """Return the step that converts the last (or every) checkpoint of runs to Hugging Face folders."""
        return step(
            title,
            [cpt("convert", "all" if every else "latest", *self.named(v), *self.overrides()) for v in variants],
            exists(*(self.exported(variant) for variant in variants)),
        )

    def plan(self, title: str, *variants: str) -> Step:
        """Return the step that shows what runs read."""
        return step(
            title,
            [cpt("blend", "plan", *self.named(variant), *self.overrides()) for variant in variants],
            lambda: is_finished(self.run(variants[-1])),
        )

    def evaluate(self, title: str, models: Mapping[str, Path], texts: Mapping[str, Path], name: str = "") -> Step:
        """Return the step that tabulates what models learned and forgot, the first model being the base."""
        output = self.evaluation / name
        few = ["--max-documents", 2 if self.short else 16]
        command = cpt(
            *("evaluate", "forgetting"),
            *(part for model, path in models.items() for part in ("--model", f"{model}={path}")),
            *(part for text, path in texts.items() for part in ("--text", f"{text}={path}")),
            *("--output", output, *few),
        )
        return step(title, [command], exists(output / "forgetting.json"))

    def bits(self, name: str = "") -> dict[str, dict[str, float]]:
        """Return bits per byte by model and text of a table that `evaluate` wrote."""
        content = json.loads((self.evaluation / name / "forgetting.json").read_text(encoding="utf-8"))
        bits: dict[str, dict[str, float]] = {}
        for result in content["changes"]:
            bits.setdefault(result["model"], {})[result["text"]] = result["bits_per_byte"]
        return bits


def base_steps(short: bool, *, trained: bool = True) -> list[Step]:
    """Return the steps that make the texts, the tokenizer and the base model, as the recipes start from them."""
    base = Recipe("mini", "tasks/mini/params/mini-3m.yaml", "400K", short)
    texts = step(
        "Texts that every machine has: prose, source, word problems, worked sums; a tokenizer",
        [python("tasks/mini/make_texts.py", TEXTS, *(["--short"] if short else []))],
        exists(TOKENIZER),
    )
    if not trained:
        return [texts]
    return [
        texts,
        step(
            "Base: prose to tokens",
            [
                cpt(
                    "tokenize",
                    "--input",
                    TEXTS / "prose.jsonl.zst",
                    "--tokenizer",
                    TOKENIZER,
                    "--output-dir",
                    TEXTS / "tokens",
                )
            ],
            exists(TEXTS / "tokens" / "prose_text_document.json"),
        ),
        step(
            "Base: random weights, converted",
            [
                python(
                    "tasks/demo/make_base.py", "tasks/mini", base.params, base.size, "base", MODELS / "untrained-hf"
                ),
                cpt(
                    "convert",
                    "hf-to-mcore",
                    MODELS / "untrained-hf",
                    MODELS / "untrained-mcore",
                    "--params",
                    base.params,
                ),
            ],
            exists(MODELS / "untrained-mcore" / "latest_checkpointed_iteration.txt"),
        ),
        base.train("Base: trained on prose", "base"),
        step(
            "Base: as a Hugging Face model",
            [
                cpt(
                    *("convert", "mcore-to-hf", base.run("base") / "checkpoints", BASE_HF),
                    *("--tokenizer", TOKENIZER),
                )
            ],
            exists(BASE_HF),
        ),
    ]


def validation(*names: str) -> dict[str, Path]:
    """Return the held-out texts of shared corpora by name."""
    return {name: TEXTS / f"{name}.validation.jsonl.zst" for name in names}


def learning_rates(run: Path) -> list[float]:
    """Return the learning rate of each logged step of a run."""
    return [record["lr"] for record in records(run) if record["kind"] == "train"]


def require_lower(bits: Mapping[str, Mapping[str, float]], text: str, lower: str, higher: str) -> str:
    """Require that one model has fewer bits per byte on a text than another; return both as a sentence."""
    found = f"{text}: {lower} {bits[lower][text]:.3f}, {higher} {bits[higher][text]:.3f} bits per byte"
    require(bits[lower][text] < bits[higher][text], f"{found}; the first was to be lower.")
    return found


def main(recipe: Recipe, document: str | None, steps: Callable[[Recipe], list[Step]]) -> None:
    """Run a recipe's steps as its command line says."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few iterations, in runs/short")
    parser.add_argument("--clean", action="store_true", help="remove what the recipe wrote first")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to make runs/ (the checkout)")
    arguments = parser.parse_args()
    directory = arguments.directory or ROOT / (SHORT_DIRECTORY if arguments.short else "")
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    recipe = Recipe(recipe.task, recipe.params, recipe.size, arguments.short)
    if arguments.clean:
        shutil.rmtree(recipe.folder, ignore_errors=True)
    begun = time.monotonic()
    try:
        run_steps(steps(recipe))
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command continues.")
    say(f"\n{recipe.task}: all done and checked in {time.monotonic() - begun:.0f} s.")
    for table in sorted(recipe.evaluation.rglob("forgetting.md")):
        say(f"\n{table}\n\n{table.read_text(encoding='utf-8')}")
