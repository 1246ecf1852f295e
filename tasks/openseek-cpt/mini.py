"""OpenSeek's continual pre-training in small: ratios, packs, ten checkpoints at most, the soup of the base with seven.

python -m tasks.openseek-cpt.mini [--short] [--clean]
"""

import json

from megatron_cpt.data.shards.discovery import read_shards
from tasks.mini.recipe import TEXTS, TOKENIZER, Recipe, base_steps, main, require, require_lower, validation
from tasks.mini.steps import Step, checked, cpt, exists, records, refused, step

RECIPE = Recipe("openseek-cpt", "tasks/openseek-cpt/params/openseek-mini-2m.yaml")
BASE = Recipe("mini", RECIPE.params, "200K")
NAMES = ("prose", "code", "math", "reasoning")
SEQ_LENGTH = 256


def steps(recipe: Recipe) -> list[Step]:
    """Return the recipe as a list of steps."""
    tokens, packed = recipe.data / "tokens", recipe.data / "packed"
    base = Recipe(BASE.task, BASE.params, BASE.size, recipe.short)
    base_hf, soup = recipe.models / "base-hf", recipe.models / "soup"
    last = recipe.iterations("main")
    interval = 1 if recipe.short else 5
    kept = [*range(interval, last + 1, interval)][-10:]
    chosen = kept[-4:-1] if recipe.short else kept[-8:-1]
    return [
        *base_steps(recipe.short, trained=False),
        step(
            "Documents to tokens",
            [
                cpt(
                    *("tokenize", "--input", *(TEXTS / f"{name}.jsonl.zst" for name in NAMES)),
                    *("--tokenizer", TOKENIZER, "--output-dir", tokens),
                )
            ],
            exists(tokens / "reasoning_text_document.json"),
        ),
        step(
            "Tokens to packed sequences of 256, by best fit",
            [
                cpt(
                    *("data", "pack", "--input", tokens / f"{name}_text_document"),
                    *("--output", packed / f"{name}_text_document", "--seq-length", SEQ_LENGTH, "--seed", 233),
                )
                for name in NAMES
            ],
            exists(packed / "reasoning_text_document.json"),
            check=lambda: check_packs(recipe),
        ),
        step(
            "Or truncation: what is longer than a sequence is cut",
            [
                cpt(
                    *("data", "pack", "--input", tokens / "reasoning_text_document", "--overflow", "truncate"),
                    *("--output", recipe.data / "truncated" / "reasoning_text_document", "--seq-length", SEQ_LENGTH),
                )
            ],
            exists(recipe.data / "truncated" / "reasoning_text_document.json"),
        ),
        refused(
            "The published ratios do not sum to 1, and are refused",
            cpt(
                *("show-config", "--task", "tasks/openseek-cpt", "--params", "openseek-1.4b-a0.4b", "--size", "7.5M"),
                "data.mix.cot_synthesis2_arxiv-high_2=0.250676",
            ),
            "data.mix sums to 1.004586",
            exists(soup),
        ),
        step(
            "Base: prose to tokens",
            [
                cpt(
                    *("tokenize", "--input", TEXTS / "prose.jsonl.zst", "--tokenizer", TOKENIZER),
                    *("--output-dir", TEXTS / "tokens"),
                )
            ],
            exists(TEXTS / "tokens" / "prose_text_document.json"),
        ),
        base.train(
            "Base: OpenSeek's architecture, trained on prose from random weights",
            "base",
            settings=["init.from_path=null"],
        ),
        step(
            "Base: as a Hugging Face model",
            [cpt("convert", "mcore-to-hf", base.run("base") / "checkpoints", base_hf, "--tokenizer", TOKENIZER)],
            exists(base_hf),
        ),
        recipe.plan("480 packed sequences, by the ratios", "main"),
        recipe.train("Training: a checkpoint every five iterations, ten at most", "main"),
        checked("Only the newest ten are on disk", lambda: check_kept(recipe, kept)),
        recipe.export("Out: every kept checkpoint", "main", every=True),
        step(
            "Soup: the unweighted mean of the base and checkpoints, what matches by name, bf16",
            [
                cpt(
                    *("soup", *recipe.named("main"), "--iterations", ",".join(map(str, chosen)), "--base", base_hf),
                    *("--match-names", "--dtype", "bf16", "--output", soup),
                )
            ],
            exists(soup),
            check=lambda: check_merge_info(recipe, len(chosen) + 1),
        ),
        *([] if recipe.short else measured(recipe)),
    ]


def measured(recipe: Recipe) -> list[Step]:
    """Return the steps that evaluate."""
    models = {name: recipe.models / folder for name, folder in (("base", "base-hf"), ("soup", "soup"))}
    models["last"] = recipe.exported("main")
    return [
        recipe.evaluate("What was learned and forgotten", models, validation("prose", "math", "reasoning")),
        checked("The soup lies between the base and the last checkpoint", lambda: check_soup(recipe)),
    ]


def check_packs(recipe: Recipe) -> str:
    """Check that every pack is exactly one sequence and that the tokens of the shard are in them and learned."""
    found = []
    for name in NAMES:
        (packed,), _ = read_shards([str(recipe.data / "packed" / f"{name}_text_document")])
        (plain,), _ = read_shards([str(recipe.data / "tokens" / f"{name}_text_document")])
        manifest = json.loads((recipe.data / "packed" / f"{name}_text_document.json").read_text(encoding="utf-8"))
        require(manifest["packed"]["seq_length"] == SEQ_LENGTH, f"{name}: packs of {manifest['packed']}.")
        require(packed.tokens % SEQ_LENGTH == 0, f"{name}: {packed.tokens} tokens are no whole packs.")
        learned = manifest["mask"]["learned"]
        require(learned >= 0.95 * plain.tokens, f"{name}: {learned} of {plain.tokens} tokens are learned.")
        found.append(f"{name} {packed.tokens // SEQ_LENGTH:,} packs, {1 - learned / packed.tokens:.1%} filling")
    return "; ".join(found)


def check_kept(recipe: Recipe, kept: list[int]) -> str:
    """Check which checkpoints are on disk, and that the loss fell."""
    on_disk = sorted(int(path.name[5:]) for path in (recipe.run("main") / "checkpoints").glob("iter_*"))
    require(on_disk == kept, f"checkpoints {on_disk} are on disk, not {kept}.")
    losses = [record["loss"] for record in records(recipe.run("main")) if record["kind"] == "train"]
    require(losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}.")
    return f"{len(kept)} checkpoints, {kept[0]} to {kept[-1]}; loss {losses[0]:.2f} to {losses[-1]:.2f}"


def check_merge_info(recipe: Recipe, num_inputs: int) -> str:
    """Check what the soup says about itself."""
    info = json.loads((recipe.models / "soup" / "merge_info.json").read_text(encoding="utf-8"))
    require(len(info["inputs"]) == num_inputs, f"{len(info['inputs'])} inputs, not {num_inputs}.")
    counts = info["counts"]
    require(counts["matched"] > 0 and not counts["skipped"] and not counts["mismatched"], f"names: {counts}.")
    return f"{num_inputs} models, {counts['matched']} names in all of them, none skipped"


def check_soup(recipe: Recipe) -> str:
    """Check that the soup learned what the run did, and lies between the base and the last checkpoint."""
    bits = recipe.bits()
    require_lower(bits, "math", "soup", "base")
    require_lower(bits, "reasoning", "last", "soup")
    return require_lower(bits, "reasoning", "soup", "base")


if __name__ == "__main__":
    main(RECIPE, __doc__, steps)
