"""Write the small corpora that the recipes' minis share, and a tokenizer with a chat template trained on them.

    python tasks/mini/make_texts.py OUTPUT_DIR [--short]

`prose` and `code` are what every installation has (tasks/demo/make_corpora.py); `math` are word problems with their answers and
`reasoning` are sums worked out digit by digit, both generated from a seed. Each is written as `NAME.jsonl.zst` and the held-out
`NAME.validation.jsonl.zst`. `--short` takes a part of the first two. Needs no network.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import tasks.demo.make_corpora as corpora
from megatron_cpt.files import whole_dir
from tasks.demo.make_corpora import Document

HELD_OUT_FRACTION = 0.04
NUM_GENERATED = 1500
NUM_SHORT = {"prose": 150, "code": 60, "math": 300, "reasoning": 300}
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ("Ada", "Bruno", "Chika", "Dagny", "Emil", "Farida", "Gustav", "Hana", "Ikaia", "Jovana", "Kenji", "Lucia")
THINGS = ("apples", "books", "bricks", "candles", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "tickets")
PLACES = ("at the market", "from a neighbour", "in the attic", "at school", "by the river", "in a drawer")


def main() -> None:
    """Write corpora and tokenizer under the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--short", action="store_true", help="a part of the corpora")
    arguments = parser.parse_args()
    texts = []
    for name, documents in sources().items():
        taken = list(itertools.islice(documents, NUM_SHORT[name] if arguments.short else None))
        kept, held_out = corpora.split_held_out(taken, HELD_OUT_FRACTION)
        texts += [document.text for document in kept]
        for suffix, part in (("", kept), (".validation", held_out)):
            path = arguments.output_dir / f"{name}{suffix}.jsonl.zst"
            corpora.write_documents(path, part)
            size = sum(len(document.text.encode()) for document in part)
            sys.stdout.write(f"{path}: {len(part):,} documents, {size:,} bytes of text\n")
    corpora.train_tokenizer(texts, arguments.output_dir / "plain-tokenizer")
    add_chat_template(arguments.output_dir / "plain-tokenizer", arguments.output_dir / "tokenizer")
    sys.stdout.write(f"{arguments.output_dir / 'tokenizer'}: byte-level BPE, {corpora.VOCAB_SIZE:,} pieces\n")


def sources() -> dict[str, Iterator[Document]]:
    """Return the corpora by name, each in a fixed order."""
    return {
        "prose": corpora.once(corpora.prose_documents()),
        "code": corpora.source_documents(),
        "math": generated("math", word_problem),
        "reasoning": generated("reasoning", worked_sum),
    }


def generated(name: str, write: Callable[[random.Random], str]) -> Iterator[Document]:
    """Yield generated documents of several problems each."""
    drawn = random.Random(name)
    for number in range(NUM_GENERATED):
        yield Document("\n\n".join(write(drawn) for _ in range(drawn.randint(3, 8))), f"{name}/{number}")


def word_problem(drawn: random.Random) -> str:
    """Return a problem in words and its answer."""
    who, other = drawn.sample(NAMES, 2)
    thing, place = drawn.choice(THINGS), drawn.choice(PLACES)
    a, b, c = drawn.randint(3, 60), drawn.randint(2, 40), drawn.randint(2, 9)
    texts = (
        (f"{who} has {a} {thing} and finds {b} more {place}. How many {thing} does {who} have now?", a + b),
        (f"{who} had {a + b} {thing}. {who} gave {b} of them to {other}. How many {thing} are left?", a),
        (f"{who} packs {thing} into {c} boxes with {a} in each box. How many {thing} are there in all?", a * c),
        (f"{who} and {other} share {a * c} {thing} found {place} among {c} friends. How many does each get?", a),
    )
    question, answer = drawn.choice(texts)
    return f"Problem: {question}\nAnswer: {answer} {thing}."


def worked_sum(drawn: random.Random) -> str:
    """Return an addition worked out digit by digit."""
    a, b = drawn.randint(100, 9999), drawn.randint(100, 9999)
    lines, carry = [f"Let me add {a} and {b} step by step."], 0
    for place, (x, y) in enumerate(zip(f"{a:04d}"[::-1], f"{b:04d}"[::-1], strict=True)):
        total = int(x) + int(y) + carry
        lines.append(
            f"Step {place + 1}: {x} + {y} + {carry} is {total}, so write {total % 10} and carry {total // 10}."
        )
        carry = total // 10
    return "\n".join([*lines, f"Therefore {a} + {b} = {a + b}."])


def add_chat_template(plain: Path, folder: Path) -> None:
    """Save the tokenizer with ChatML's two tokens and template added."""
    from transformers import AutoTokenizer  # seconds to start

    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    with whole_dir(folder) as temporary:
        tokenizer.save_pretrained(temporary)


if __name__ == "__main__":
    main()
