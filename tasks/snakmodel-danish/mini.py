"""SnakModel in small: lines of text, deduplicated, to tokens; a Hugging Face model in and checked; crash; checkpoints out.

python -m tasks.snakmodel-danish.mini [--short] [--clean]
"""

import itertools
import json

from tasks.mini.recipe import BASE_HF, TOKENIZER, Recipe, base_steps, main, require, require_lower, validation
from tasks.mini.steps import Step, checked, cpt, exists, has_trained, is_finished, python, records, run_and_kill, step

RECIPE = Recipe("snakmodel-danish", "tasks/mini/params/mini-3m.yaml")
KILL_AT_FRACTION = 0.6
SOURCES = ("dawiki", "news", "forum")


def steps(recipe: Recipe) -> list[Step]:
    """Return the recipe as a list of steps."""
    data, base = recipe.data, recipe.models / "base-mcore"
    clean, split = data / "deduplicated", data / "split"
    run = recipe.run("main")
    train = cpt("submit", "train", *recipe.named("main"), *recipe.overrides())
    kill_at = max(int(KILL_AT_FRACTION * recipe.iterations("main")), 2)
    return [
        *base_steps(recipe.short),
        step(
            "Documents: raw text files, a document per line",
            [
                python(
                    "tasks/snakmodel-danish/make_texts.py",
                    data / "raw",
                    *(["--documents", "300"] if recipe.short else []),
                )
            ],
            exists(data / "raw" / "duplicates.json"),
        ),
        step(
            "Deduplication: MinHash of 5-grams, 64 functions, similarity 0.85, seed 42, over all sources",
            [
                cpt(
                    *("data", "dedup", *(f"{source}={data / 'raw' / source}.txt" for source in SOURCES)),
                    *("--output", clean, "--ngram", 5, "--num-perm", 64, "--threshold", 0.85, "--seed", 42),
                )
            ],
            exists(clean / "report.json"),
            check=lambda: check_dedup(recipe),
        ),
        step(
            "A validation set, and tokens",
            [
                cpt(
                    "data",
                    "split",
                    f"all={clean}/*/*.txt",
                    "--name",
                    "validation",
                    "--fraction",
                    "0.04",
                    "--output",
                    split,
                ),
                *(
                    cpt(
                        *("tokenize", "--input", split / "all" / side, "--tokenizer", TOKENIZER),
                        *("--output-prefix", data / "tokens" / name),
                    )
                    for side, name in (("train", "danish"), ("validation", "danish.validation"))
                ),
            ],
            exists(data / "tokens" / "danish.validation_text_document.json"),
        ),
        step(
            "The Hugging Face base in, read back bit by bit, and its logits compared",
            [
                cpt("convert", "hf-to-mcore", BASE_HF, base, "--params", recipe.params, "--verify"),
                cpt("convert", "verify", BASE_HF, base, "--logits"),
            ],
            exists(base / "latest_checkpointed_iteration.txt"),
        ),
        step(
            "Training on two tensor-parallel ranks; one is killed (SIGKILL) on the way",
            [train],
            lambda: has_trained(run, kill_at),
            run=lambda command: run_and_kill(command, run, kill_at),
        ),
        step("The same command continues from the last checkpoint", [train], lambda: is_finished(run)),
        checked("Every iteration was trained, and not again from the beginning", lambda: check_continued(recipe)),
        recipe.export("Out: all checkpoints to Hugging Face", "main", every=True),
        step(
            "To the hub, in files of 5 MB at most (2 GB for the real model); said only, for want of a network",
            [
                cpt(
                    *("hub", "push", recipe.exported("main"), "--repo", "my-team/snakmodel-mini"),
                    *("--max-shard-size", "5MB", "--private", "--dry-run"),
                )
            ],
            lambda: False,
        ),
        *([] if recipe.short else measured(recipe)),
    ]


def measured(recipe: Recipe) -> list[Step]:
    """Return the steps that evaluate."""
    models = {"base": BASE_HF, **{f"iteration-{i}": recipe.exported("main", i) for i in saved(recipe)[1::2]}}
    texts = {"danish": recipe.data / "split" / "all" / "validation", **validation("prose")}
    return [
        recipe.evaluate("What was learned and forgotten", models, texts),
        checked("Danish was learned", lambda: require_lower(recipe.bits(), "danish", list(models)[-1], "base")),
    ]


def saved(recipe: Recipe) -> list[int]:
    """Return the iterations that are saved."""
    last = recipe.iterations("main")
    return [*range(1, last + 1)] if recipe.short else [*range(10, last + 1, 10)]


def check_dedup(recipe: Recipe) -> str:
    """Check that copies and near-copies are gone, and nearly nothing else."""
    made = json.loads((recipe.data / "raw" / "duplicates.json").read_text(encoding="utf-8"))
    files = [path for path in (recipe.data / "deduplicated").rglob("*") if path.suffix in (".txt", ".jsonl")]
    kept = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    wanted = made["documents"]
    require(
        0.99 * wanted <= kept <= wanted + 0.02 * made["near_copies"],
        f"{kept} documents are left of {wanted} different ones.",
    )
    return f"{sum(made.values())} documents, {kept} left; {wanted} are different"


def check_continued(recipe: Recipe) -> str:
    """Check that the second job began at a checkpoint and that the loss fell."""
    trained = [record for record in records(recipe.run("main")) if record["kind"] == "train"]
    iterations = [record["iteration"] for record in trained]
    back = [later for before, later in itertools.pairwise(iterations) if later <= before]
    require(iterations[-1] == recipe.iterations("main"), f"the run ended at iteration {iterations[-1]}.")
    require(not back or min(back) > 1, "the run began again at iteration 1.")
    return f"the loss went from {trained[0]['loss']:.2f} to {trained[-1]['loss']:.2f} in {iterations[-1]} iterations"


if __name__ == "__main__":
    main(RECIPE, __doc__, steps)
