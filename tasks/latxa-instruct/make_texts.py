"""Write small Basque-looking chat and text files as Magpie's and Latxa's look.

    python tasks/latxa-instruct/make_texts.py OUTPUT_DIR [--conversations N]

`chat.jsonl` holds `{"conversation_id", "lang", "conversations": [{"role", "content"}, ...]}`: one to three turns, two thirds Basque,
one third English; a tenth have an id that begins with `translation_`, a tenth repeat an earlier prompt, and three are bad (two
user turns in a row, an empty answer, an unknown role). `text.jsonl` and `text.validation.jsonl` are running text. `counts.json`
says how many of each, so that filters can be checked. Generated from a seed.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from megatron_cpt.files import write_text
from tasks.mini.grammar import filled, paragraph, read_grammar

NUM_CONVERSATIONS = 1500
NUM_TEXTS = 300
BAD = (
    [
        {"role": "user", "content": "Kaixo"},
        {"role": "user", "content": "Kaixo?"},
        {"role": "assistant", "content": "Bai"},
    ],
    [{"role": "user", "content": "Zer moduz?"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "Nor zara?"}, {"role": "narrator", "content": "Inor ez"}],
)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--conversations", type=int, default=NUM_CONVERSATIONS, metavar="N", help="good ones")
    arguments = parser.parse_args()
    grammar = read_grammar(Path(__file__).with_name("basque.yaml"))
    drawn = random.Random(33)
    seen: set[str] = set()
    records = []
    for number in range(arguments.conversations):
        language = "en" if number % 3 == 2 else "eu"
        origin = "translation" if number % 10 == 7 else "magpie"
        records.append(record(f"{origin}_{number}", language, conversation(grammar, language, number, drawn)))
    again = [record(f"again_{n}", r["lang"], r["conversations"][:2]) for n, r in enumerate(records[::10])]
    bad = [record(f"bad_{number}", "eu", turns) for number, turns in enumerate(BAD)]
    write(arguments.output_dir / "chat.jsonl", records + again + bad)
    texts = [{"text": paragraph(grammar, drawn, drawn.randint(8, 20))} for _ in range(NUM_TEXTS)]
    write(arguments.output_dir / "text.jsonl", texts[: NUM_TEXTS * 9 // 10])
    write(arguments.output_dir / "text.validation.jsonl", texts[NUM_TEXTS * 9 // 10 :])
    for r in records:
        if not r["conversation_id"].startswith("translation_"):
            seen.add(r["conversations"][0]["content"])
    counts = {"good": len(records), "repeated": len(again), "bad": len(bad), "different_prompts": len(seen)}
    write_text(arguments.output_dir / "counts.json", json.dumps(counts) + "\n")


def conversation(grammar: dict, language: str, number: int, drawn: random.Random) -> list[dict[str, str]]:
    """Return one to three questions with answers that use the same words; the first names its number, to be its own."""
    turns = []
    for turn in range(drawn.randint(1, 3)):
        question, answer = drawn.choice(grammar["questions" if language == "eu" else "english"])
        chosen = {slot: [drawn.choice(choices)] for slot, choices in grammar["words"].items()}
        start = f"{number}. " if turn == 0 else ""
        turns.append({"role": "user", "content": start + filled(question, chosen, drawn)})
        turns.append({"role": "assistant", "content": filled(answer, chosen, drawn)})
    return turns


def record(identifier: str, language: str, turns: list[dict[str, str]]) -> dict:
    """Return a record as Magpie's files hold it."""
    return {"conversation_id": identifier, "lang": language, "conversations": turns}


def write(path: Path, records: list[dict]) -> None:
    """Write JSON lines and say so."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    sys.stdout.write(f"{path}: {len(records):,} records\n")


if __name__ == "__main__":
    main()
