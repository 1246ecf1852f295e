"""Write small Danish-looking text files, a document per line, with copies and near-copies among them.

    python tasks/snakmodel-danish/make_texts.py OUTPUT_DIR [--documents N]

Three files play three sources. A tenth of the documents appear again as they are and a tenth with one word changed, as
crawls hold them; `duplicates.json` says how many, so that deduplication can be checked. Generated from a seed.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from megatron_cpt.files import write_text
from tasks.mini.grammar import paragraph, read_grammar

SOURCES = ("dawiki", "news", "forum")
NUM_DOCUMENTS = 900


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--documents", type=int, default=NUM_DOCUMENTS, metavar="N", help="documents before copies")
    arguments = parser.parse_args()
    drawn = random.Random(42)
    grammar = read_grammar(Path(__file__).with_name("danish.yaml"))
    documents = [paragraph(grammar, drawn, drawn.randint(14, 30)) for _ in range(arguments.documents)]
    tenth = arguments.documents // 10
    copies = documents[:tenth] + [changed(text, drawn) for text in documents[tenth : 2 * tenth]]
    lines = [*documents, *copies]
    drawn.shuffle(lines)
    for number, source in enumerate(SOURCES):
        part = lines[number :: len(SOURCES)]
        write_text(arguments.output_dir / f"{source}.txt", "\n".join(part) + "\n")
        sys.stdout.write(f"{arguments.output_dir / source}.txt: {len(part):,} documents\n")
    counts = {"documents": len(documents), "copies": tenth, "near_copies": tenth}
    write_text(arguments.output_dir / "duplicates.json", json.dumps(counts) + "\n")


def changed(text: str, drawn: random.Random) -> str:
    """Return a text with one of its words replaced."""
    words = text.split(" ")
    words[drawn.randrange(len(words))] = "Danmark"
    return " ".join(words)


if __name__ == "__main__":
    main()
