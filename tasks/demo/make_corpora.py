"""Write the demo's two corpora from text that every installation has, and train a tokenizer on them.

    python tasks/demo/make_corpora.py OUTPUT_DIR

D0 is English technical prose: the topics of `pydoc_data`, the descriptions, licences and documentation of the
installed packages, and the prose of the docstrings of a few scientific packages, one document per file. D1 is
Python source: the standard library of this interpreter without its tests. A paragraph of prose appears once in D0,
however many packages carry the same licence.

Writes `D0.jsonl.zst` and `D1.jsonl.zst` (one `{"text", "source"}` object per line), the held-out
`D0.validation.jsonl.zst` and `D1.validation.jsonl.zst`, and the Hugging Face tokenizer folder `tokenizer/`. A document
is held out by the hash of its text, so a set stays nearly the same when packages change. Needs no network.
"""

import argparse
import ast
import importlib
import io
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from megatron_cpt.files import text_hash, whole_dir, whole_file

VOCAB_SIZE = 8192
EOD_TOKEN = "<|endoftext|>"
# Shares of documents held out: some 150 kB of text each, read in seconds.
HELD_OUT_FRACTION = {"D0": 0.04, "D1": 0.04}
MAX_HELD_OUT_BYTES = 30_000

PROSE_SUFFIXES = {".md", ".rst", ".txt"}
PROSE_NAMES = {"METADATA", "LICENSE", "LICENCE", "NOTICE", "COPYING", "README", "AUTHORS"}
DOCSTRING_PACKAGES = ("matplotlib", "networkx", "numpy", "sympy")
# Not source that a person wrote: prose, character tables, and files generated for one machine.
NOT_SOURCE = {"pydoc_data", "encodings", "idlelib", "test", "tests", "_sysconfigdata", "__phello__"}
MIN_DOCUMENT_BYTES = 400


@dataclass(frozen=True)
class Document:
    """A text and where it came from (a path inside the installation)."""

    text: str
    source: str


def main() -> None:
    """Write corpora and tokenizer under the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    output_dir: Path = parser.parse_args().output_dir
    corpora = {"D0": list(once(prose_documents())), "D1": list(source_documents())}
    training_texts = []
    for name, documents in corpora.items():
        kept, held_out = split_held_out(documents, HELD_OUT_FRACTION[name])
        training_texts += [document.text for document in kept]
        for suffix, part in (("", kept), (".validation", held_out)):
            path = output_dir / f"{name}{suffix}.jsonl.zst"
            write_documents(path, part)
            size = sum(len(document.text.encode()) for document in part)
            sys.stdout.write(f"{path}: {len(part):,} documents, {size:,} bytes of text\n")
    if not (output_dir / "tokenizer").exists():
        train_tokenizer(training_texts, output_dir / "tokenizer")
        sys.stdout.write(f"{output_dir / 'tokenizer'}: byte-level BPE, {VOCAB_SIZE:,} pieces\n")


def prose_documents() -> Iterator[Document]:
    """Yield the English prose of this installation, in a fixed order."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield Document(prose(topics[topic]), f"pydoc_data/topics/{topic}")
    site_packages = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(site_packages.rglob("*")):
        is_prose = path.suffix in PROSE_SUFFIXES or path.name.split(".")[0].split("-")[0] in PROSE_NAMES
        if is_prose and path.is_file() and path.suffix not in (".py", ".so"):
            yield Document(prose(read_utf8(path)), str(path.relative_to(site_packages)))
    for package in DOCSTRING_PACKAGES:
        for path in sorted((site_packages / package).rglob("*.py")):
            if not NOT_SOURCE & set(path.relative_to(site_packages).parts):
                text = "\n\n".join(docstrings(read_utf8(path)))
                yield Document(prose(text), f"{path.relative_to(site_packages)}:docstrings")


def source_documents() -> Iterator[Document]:
    """Yield the modules of the standard library that people wrote, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        top = parts[0].removesuffix(".py")
        if top not in sys.stdlib_module_names or NOT_SOURCE & {*parts, top}:
            continue
        text = read_utf8(path)
        if len(text) >= MIN_DOCUMENT_BYTES:
            yield Document(text, "/".join(parts))


def prose(text: str) -> str:
    """Return the paragraphs of running English text: no code, tables, markup lines, fields or lists of names."""
    text = re.sub(r"```.*?(```|\Z)|~~~.*?(~~~|\Z)|<[^>\n]{1,200}>", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    paragraphs = (re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text) if "\n>>>" not in block)
    return "\n\n".join(paragraph for paragraph in paragraphs if is_prose(paragraph))


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph looks like sentences: mostly words, common ones among them, ending as a sentence."""
    words = paragraph.split()
    plain = sum(word.strip(".,;:()'\"`*").isalpha() for word in words)
    return (
        len(words) >= 8
        and plain / len(words) > 0.75
        and paragraph[-1] in ".:!?)\"'"
        and paragraph.isascii()
        and not paragraph.startswith((">>>", "$ ", "..", "|", "- [", "#", "Args:", "Returns:"))
        and not any(rule in paragraph for rule in ("---", "===", "***", "::"))
        and bool({"the", "a", "of", "to", "is", "and", "in"} & set(words))
    )


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions; nothing when it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    nodes: list[ast.Module | ast.ClassDef | ast.FunctionDef] = [tree]
    while nodes:
        node = nodes.pop()
        yield ast.get_docstring(node) or ""
        nodes += [child for child in reversed(node.body) if isinstance(child, ast.ClassDef | ast.FunctionDef)]


def once(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield documents without the paragraphs that an earlier one had; those that become tiny are left out."""
    seen: set[str] = set()
    for document in documents:
        fresh = []
        for paragraph in document.text.split("\n\n"):
            if paragraph not in seen:
                seen.add(paragraph)
                fresh.append(paragraph)
        text = "\n\n".join(fresh)
        if len(text) >= MIN_DOCUMENT_BYTES:
            yield Document(text, document.source)


def split_held_out(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Return documents to train on and held-out ones; a document's own hash decides where it goes."""
    kept: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        drawn = int(text_hash(document.text)[:8], 16) / 2**32
        is_held_out = drawn < fraction and len(document.text) <= MAX_HELD_OUT_BYTES
        (held_out if is_held_out else kept).append(document)
    return kept, held_out


def write_documents(path: Path, documents: list[Document]) -> None:
    """Write documents as zstandard-compressed JSON lines."""
    with (
        whole_file(path, "wb") as file,
        zstandard.ZstdCompressor(level=10).stream_writer(file, closefd=False) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as lines,
    ):
        for document in documents:
            record = {"text": document.text, "source": document.source}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Train a byte-level BPE of VOCAB_SIZE pieces and save it as a Hugging Face tokenizer folder."""
    # Imported here: a second of start-up that --help does not need.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD_TOKEN, model_max_length=2048)
    with whole_dir(folder) as temporary:
        wrapped.save_pretrained(temporary)


def read_utf8(path: Path) -> str:
    """Return a file's text; empty when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


if __name__ == "__main__":
    main()
