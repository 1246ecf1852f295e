"""LLM-jp's mid-training in small: documents to lists under their scripts' names, full continuation, seeds, soup.

python -m tasks.llmjp-v4-midtraining.mini [--short] [--clean]
"""

import math
from fractions import Fraction
from pathlib import Path

from megatron_cpt.data.lists.data_list import read_data_list
from tasks.mini.recipe import (
    BASE_HF,
    TEXTS,
    TOKENIZER,
    Recipe,
    base_steps,
    learning_rates,
    main,
    require,
    validation,
)
from tasks.mini.steps import Command, Step, checked, cpt, exists, python, records, step

RECIPE = Recipe("llmjp-v4-midtraining", "tasks/mini/params/mini-3m.yaml")
SEEDS = ("decay", "decay-seed-43", "decay-seed-44")
# The published ratios; what a list does not name counts once.
RATIOS = {
    "50B": {"dclm": "0.0323", "flan": "0.5", "pes2o": "0.0515"},
    "100B": {"dclm": "0.0685", "pes2o": "0.167", "math": "2"},
    "300B": {"dclm": "0.2078", "flan": "2", "stackexchange": "4", "math": "4", "wiki": "4"},
}
SCALE = 1_000_000
"""A budget of the mini is the published one divided by this."""


def steps(recipe: Recipe) -> list[Step]:
    """Return the recipe as a list of steps."""
    data, lists = recipe.data, recipe.data / "lists"
    variants = SEEDS[:1] if recipe.short else (*SEEDS, "constant")
    members = [BASE_HF, recipe.exported("decay")] if recipe.short else [recipe.exported(seed) for seed in SEEDS]
    soup = recipe.models / "soup"
    return [
        *base_steps(recipe.short),
        step(
            "Documents: a tree like dolmino-mix-1124, small compressed files with blank lines at their ends",
            [python("tasks/llmjp-v4-midtraining/make_tree.py", TEXTS, data / "dolmino-mix-1124")],
            exists(data / "dolmino-mix-1124" / "math"),
        ),
        step(
            "Documents to tokens, by the scripts' names",
            [
                ["tools/extract.sh", str(data / "dolmino-mix-1124"), str(data / "extracted")],
                ["tools/merge_files.sh", str(data / "extracted"), str(data / "extracted-merged")],
                ["tools/tokenize.sh", str(data / "extracted-merged"), str(TOKENIZER), str(data / "tokenized")],
            ],
            exists(data / "tokenized" / "math"),
        ),
        step(
            "Lists: every shard with its exact tokens; the published ratios; budgets a millionth of the published ones",
            [
                ["tools/build_train_data.sh", str(data / "tokenized"), str(lists / "train_data.all.sh")],
                *(update(lists, size, None) for size in RATIOS),
                *(update(lists, size, budget(size)) for size in RATIOS),
            ],
            exists(lists / f"train_data_{budget('300B')}.sh"),
            check=lambda: check_lists(lists),
        ),
        recipe.plan("Blend: the 50B mix as task.yaml states it", "decay"),
        recipe.train("Mid-training from the base's weights and optimizer state", *variants),
        checked(
            "The optimizer's state came along, and the learning rates are what was asked", lambda: check_runs(recipe)
        ),
        step(
            "Out: the newest checkpoint of each run as a Hugging Face folder",
            [
                ["tools/convert_latest.sh", f"tasks/{recipe.task}", recipe.params, recipe.size, "--variant", variant]
                for variant in variants
            ],
            exists(*(recipe.exported(variant) for variant in variants)),
        ),
        step(
            "Soup of the seeds",
            [cpt("soup", "--inputs", *members, "--output", soup)],
            exists(soup),
        ),
        *([] if recipe.short else measured(recipe)),
    ]


def measured(recipe: Recipe) -> list[Step]:
    """Return the steps that evaluate."""
    runs = {variant: recipe.exported(variant) for variant in (*SEEDS, "constant")}
    models = {"base": BASE_HF, **runs, "soup": recipe.models / "soup"}
    return [
        recipe.evaluate("Evaluation: the soup against its members", models, validation("prose", "math", "reasoning")),
        checked("The soup is better than the mean of its members, and than the base", lambda: check_soup(recipe)),
    ]


def budget(size: str) -> str:
    """Return the mini's budget of a published size: `50K` for 50B."""
    return f"{int(size.removesuffix('B')) * 10**9 // SCALE // 1000}K"


def update(lists: Path, size: str, target: str | None) -> Command:
    """Return the command that makes a list by a size's ratios: as many tokens as the ratios give, or exactly `target`."""
    rules = [word for pattern, ratio in RATIOS[size].items() for word in ("--ratio", f"{pattern}={ratio}")]
    rules += ["--ratio", "*=1"]
    if target is None:
        output = lists / f"train_data_ratios_{size}.sh"
        return cpt("blend", "rescale", lists / "train_data.all.sh", "--output", output, *rules)
    output = lists / f"train_data_{target}.sh"
    return ["tools/update_train_data.sh", target, str(lists / "train_data.all.sh"), str(output), *rules]


def check_lists(lists: Path) -> str:
    """Check every line of every list: `ceil(tokens * ratio)`, and sums that are exactly the budget."""
    available = {entry.prefix: entry.tokens or 0 for entry in read_data_list(lists / "train_data.all.sh")}
    for size, ratios in RATIOS.items():
        for entry in read_data_list(lists / f"train_data_ratios_{size}.sh"):
            ratio = next((Fraction(r) for name, r in ratios.items() if f"/{name}/" in entry.prefix), Fraction(1))
            wanted = math.ceil(available[entry.prefix] * ratio)
            require(entry.tokens == wanted, f"{size}: {entry.prefix} has {entry.tokens}, not {wanted}.")
        drawn = sum(entry.tokens or 0 for entry in read_data_list(lists / f"train_data_{budget(size)}.sh"))
        wanted = int(budget(size).removesuffix("K")) * 1000
        require(drawn == wanted, f"{size}: the list sums to {drawn}, not {wanted}.")
    return (
        f"{len(available)} shards, {sum(available.values()):,} tokens; ceil(tokens * ratio) in every line, exact sums"
    )


def check_runs(recipe: Recipe) -> str:
    """Check that the runs began where the base ended, with its moments, and that the learning rates are right."""
    base = [r["loss"] for r in records(Path("runs/mini/mini-3m/400K/base")) if r["kind"] == "train"][-1]
    run = recipe.run("decay")
    logs = "".join(path.read_text(encoding="utf-8") for path in (run / "logs").rglob("rank_00000.log"))
    require("(weights and optimizer)" in logs, f"{run}/logs do not say that the optimizer's state was loaded.")
    rates = learning_rates(run)
    require(rates[0] == max(rates) and rates[-1] < 0.3 * rates[0], f"the rate of decay went {rates[0]} to {rates[-1]}.")
    if not recipe.short:
        require(len(set(learning_rates(recipe.run("constant")))) == 1, "the rate of constant is not constant.")
    return f"the base ended at loss {base:.2f}; decay from {rates[0]:.1e} to {rates[-1]:.1e}"


def check_soup(recipe: Recipe) -> str:
    """Check that averaging helps over the members' mean, and that the new text was learned."""
    bits = recipe.bits()
    members = [sum(bits[seed].values()) for seed in SEEDS]
    mean = sum(members) / len(members)
    merged, base = sum(bits["soup"].values()), sum(bits["base"].values())
    require(
        merged < mean, f"the soup has {merged:.4f} bits per byte over all texts, its members {mean:.4f} on average."
    )
    require(merged < base, f"the soup has {merged:.4f} bits per byte over all texts, the base {base:.4f}.")
    return f"bits per byte over all texts: soup {merged:.4f}, mean of the members {mean:.4f}, base {base:.4f}"


if __name__ == "__main__":
    main(RECIPE, __doc__, steps)
