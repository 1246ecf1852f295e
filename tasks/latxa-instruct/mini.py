"""Latxa's instruction tuning in small: filters, held-out sets, packing, assistant-only loss, NEFTune, text mixed in, epochs.

python -m tasks.latxa-instruct.mini [--short] [--clean]
"""

import json
import shlex
from pathlib import Path

from megatron_cpt.data.shards.discovery import read_shards
from tasks.mini.recipe import BASE_HF, TOKENIZER, Recipe, base_steps, main, require, require_lower
from tasks.mini.steps import Command, Step, checked, cpt, exists, is_finished, python, records, step

RECIPE = Recipe("latxa-instruct", "tasks/mini/params/mini-3m.yaml")
SEQ_LENGTH, NUM_HELD_OUT = 256, 30
PROMPTS = tuple(
    f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    for question in ("9001. Zein koloretakoa da liburua?", "9002. Where is the lamp?")
)


def steps(recipe: Recipe) -> list[Step]:
    """Return the recipe as a list of steps."""
    data = recipe.data
    tokens = data / "tokens"
    number = 300 if recipe.short else 700
    variants = ["main"] if recipe.short else ["main", "no-neftune"]
    tuned = {variant: recipe.models / variant for variant in variants}
    return [
        *base_steps(recipe.short),
        step(
            "Documents: conversations with bad ones, translations and repeated prompts among them; running text",
            [python("tasks/latxa-instruct/make_texts.py", data / "raw", "--conversations", number)],
            exists(data / "raw" / "counts.json"),
        ),
        step(
            "Preprocessing, a CPU job of its own: filters, held-out sets per language, masks, packing",
            [
                cpt(
                    "submit",
                    "job",
                    *recipe.named("main"),
                    "--name",
                    "prepare-chat",
                    "--command",
                    shlex.join(prepare(recipe)),
                )
            ],
            exists(tokens / "chat_chat_document.json"),
            check=lambda: check_chat(recipe),
        ),
        step(
            "Completion data: text to tokens to packs",
            [
                cpt(
                    "tokenize",
                    "--input",
                    data / "raw" / "text.jsonl",
                    "--tokenizer",
                    TOKENIZER,
                    "--output-prefix",
                    tokens / "text",
                ),
                cpt(
                    *("data", "pack", "--input", tokens / "text_text_document", "--seq-length", SEQ_LENGTH),
                    *("--output", tokens / "text-packed_text_document"),
                ),
            ],
            exists(tokens / "text-packed_text_document.json"),
        ),
        step(
            "Three epochs of the conversations, a tenth of running text beside them",
            [cpt("blend", "plan", *recipe.named("main"), *recipe.overrides())],
            lambda: is_finished(recipe.run("main")),
        ),
        recipe.train("Training with NEFTune, and without", *variants),
        checked("What the assistant says was learned, in both languages", lambda: check_held_out(recipe, variants)),
        step(
            "Out: Hugging Face folders",
            [
                cpt("convert", "mcore-to-hf", recipe.run(variant) / "checkpoints", folder, "--tokenizer", TOKENIZER)
                for variant, folder in tuned.items()
            ],
            exists(*tuned.values()),
        ),
        *([] if recipe.short else measured(recipe)),
    ]


def measured(recipe: Recipe) -> list[Step]:
    """Return the steps that evaluate."""
    tuned = {variant: recipe.models / variant for variant in ("main", "no-neftune")}
    text = {"basque": recipe.data / "raw" / "text.validation.jsonl"}
    generate = cpt(
        *("evaluate", "generate", "--model", f"base={BASE_HF}", "--model", f"tuned={tuned['main']}"),
        *("--tokens", 24, *(word for prompt in PROMPTS for word in ("--prompt", prompt))),
    )
    return [
        recipe.evaluate("Running text: learned beside the conversations", {"base": BASE_HF, **tuned}, text),
        checked("Basque was learned", lambda: require_lower(recipe.bits(), "basque", "main", "base")),
        step("Samples side by side", [generate], lambda: False),
    ]


def prepare(recipe: Recipe) -> Command:
    """Return the preprocessing command, as the job runs it."""
    return cpt(
        *("data", "prepare-chat", "--input", recipe.data / "raw" / "chat.jsonl", "--tokenizer", TOKENIZER),
        *("--output-prefix", recipe.data / "tokens" / "chat", "--drop", "conversation_id^=translation_"),
        *("--dedup-prompts", "--held-out", NUM_HELD_OUT, "--held-out-by", "lang", "--pack", SEQ_LENGTH),
        *("--on-bad", "skip"),
    )


def check_chat(recipe: Recipe) -> str:
    """Check what the filters left, and that about the assistant's part of the tokens is learned."""
    made = json.loads((recipe.data / "raw" / "counts.json").read_text(encoding="utf-8"))
    prefix = recipe.data / "tokens" / "chat_chat_document"
    manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    wanted = made["different_prompts"] - 2 * NUM_HELD_OUT
    found = manifest["statistics"]["conversations"]
    require(found == wanted, f"{found} conversations are left, not {wanted}.")
    require(sum(manifest["rejects"].values()) == made["bad"], f"rejected: {manifest['rejects']}, not {made['bad']}.")
    (shard,), _ = read_shards([str(prefix)])
    share = manifest["mask"]["learned"] / shard.tokens
    require(0.2 < share < 0.6, f"{share:.0%} of the tokens are learned.")
    return f"{found} conversations of {made}; {share:.0%} of {shard.tokens:,} tokens are learned"


def check_held_out(recipe: Recipe, variants: list[str]) -> str:
    """Check that the loss on held-out answers fell in both languages."""
    found = []
    for variant in variants:
        for language in ("eu", "en"):
            measured = [
                record["loss"]
                for record in records(recipe.run(variant))
                if record["kind"] == "validation" and record["corpus"] == language
            ]
            least = measured[0] if recipe.short else 0.7 * measured[0]
            require(
                measured[-1] < least,
                f"{variant}: held-out {language} went from {measured[0]:.3f} to {measured[-1]:.3f}.",
            )
            found.append(f"{variant} {language} {measured[0]:.2f} to {measured[-1]:.2f}")
    return "; ".join(found)


if __name__ == "__main__":
    main(RECIPE, __doc__, steps)
