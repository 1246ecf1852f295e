"""Write a small tree of documents in the shape of dolmino-mix-1124: many small compressed files per corpus.

    python tasks/llmjp-v4-midtraining/make_tree.py TEXTS_DIR OUTPUT_DIR

Web, papers and encyclopedia are parts of the shared prose, stackexchange is source, flan are word problems, math worked sums. The
files end in blank lines, as GSM8K's do, which stopped the original tokenization.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import zstandard

from megatron_cpt.evaluate.models.texts import read_text_set
from megatron_cpt.files import whole_file

NUM_FILES = 3
PARTS = {"dclm": ("prose", range(6)), "pes2o": ("prose", range(6, 8)), "wiki": ("prose", range(8, 10))}
WHOLE = {"flan": "math", "stackexchange": "code", "math": "reasoning"}


def main() -> None:
    """Write the tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts_dir", type=Path, metavar="TEXTS_DIR")
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    arguments = parser.parse_args()
    for corpus in (*PARTS, *WHOLE):
        name, tenths = PARTS.get(corpus, (WHOLE.get(corpus), range(10)))
        texts = read_text_set(str(name), [arguments.texts_dir / f"{name}.jsonl.zst"]).documents
        chosen = [text for number, text in enumerate(texts) if number % 10 in tenths]
        for part in range(NUM_FILES):
            lines = [json.dumps({"text": text}) + "\n" for text in chosen[part::NUM_FILES]]
            write(arguments.output_dir / corpus / f"{corpus}-{part:04d}.json", "".join(lines) + "\n\n", part)
        sys.stdout.write(f"{arguments.output_dir / corpus}: {NUM_FILES} files, {len(chosen):,} documents\n")


def write(path: Path, text: str, number: int) -> None:
    """Write a file plain, with gzip, or with zstandard, by its number."""
    suffix, pack = (("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress))[number % 3]
    with whole_file(path.with_name(path.name + suffix), "wb") as file:
        file.write(pack(text.encode()))


if __name__ == "__main__":
    main()
