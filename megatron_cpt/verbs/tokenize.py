"""Turn documents into Megatron's .bin/.idx token files, each with a JSON manifest.

Inputs are files, folders or globs of .jsonl/.json (an object per line), .txt, each plain or .gz/.zst/.xz/.bz2, .parquet
and .arrow. With --output-prefix everything becomes one shard per json key, `<prefix>_<key>_document`; with --output-dir
the input tree is mirrored, a shard per file, or with --shard-tokens a shard per group of files. The same command again
keeps the shards that are whole. The output depends neither on --workers nor on --engine.

A job array assigns a part to each member: `--shard $SLURM_ARRAY_TASK_ID/16` (or `$PBS_ARRAY_INDEX/16`), numbers from 0; with
--output-prefix `megatron-cpt data merge` joins the parts.

Example: megatron-cpt tokenize --input corpora/D1 --tokenizer models/base --output-dir tokens/D1 --workers 16
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_cpt.verbs.vocabulary import add_keys_argument, add_workers_argument, keys_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="Hugging Face folder (read as transformers reads it), tokenizer.json or SentencePiece .model",
    )
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output-prefix", type=Path, help="one shard: prefix without _<key>_document")
    output.add_argument("--output-dir", type=Path, help="a tree of shards that mirrors the inputs")
    add_keys_argument(parser, "key or column that holds text")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: on)",
    )
    parser.add_argument("--eod-token", help="end-of-document token, where the tokenizer's eos_token is not the one")
    parser.add_argument(
        "--special-tokens",
        choices=("text", "token", "reject"),
        help="a control token that a text spells is text (default), is the token, which ends documents, or makes the document a "
        "bad line",
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "on", "off"),
        default="auto",
        help="begin each document with the token that begins texts: auto does what the tokenizer's post-processor does",
    )
    add_workers_argument(parser)
    parser.add_argument(
        "--shard-tokens", type=parse_count_argument, help="group files into shards of about this many tokens (500M)"
    )
    parser.add_argument(
        "--num-shards", type=int, metavar="N", help="group all files, whatever their folders, into N shards"
    )
    parser.add_argument(
        "--across-folders", action="store_true", help="with --shard-tokens: group files of different folders too"
    )
    parser.add_argument(
        "--shard", type=parse_part_argument, metavar="I/N", help="do the i-th of n parts of the work, i from 0 to n-1"
    )
    parser.add_argument(
        "--on-bad-line",
        choices=("fail", "skip", "strict"),
        default="fail",
        help="fail: stop at the first line that is no document; skip: count them and keep them in a reject file; "
        "strict: stop at blank lines, byte-order marks, empty texts and a missing last newline as well",
    )
    parser.add_argument("--provenance", action="store_true", help="keep file and line of each document (data trace)")
    parser.add_argument(
        "--engine",
        choices=("auto", "gigatoken", "fastokens", "reference"),
        default="auto",
        help="encoder; auto takes the fastest that gives the reference tokenizer's ids",
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the documents are; the data verbs share them."""
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or (quoted) globs of documents")
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="take only files that match")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave out files that match")
    parser.add_argument(
        "--format",
        choices=("jsonl", "json", "txt", "parquet", "arrow"),
        help="what the files are, whatever their names say",
    )
    parser.add_argument(
        "--txt-documents", choices=("line", "file"), default="line", help="a .txt holds a document per line, or is one"
    )
    parser.add_argument(
        "--max-document-bytes",
        type=parse_count_argument,
        default=256 << 20,
        help="a longer line is a bad line (default: 256 MiB)",
    )


def run(arguments: argparse.Namespace) -> int | None:
    # numpy and the tokenizer libraries are slow to import; --help must not wait for them
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from megatron_cpt.data.tokenize.driver import tokenize
    from megatron_cpt.data.tokenize.options import TokenizeOptions

    report = tokenize(
        arguments.input,
        arguments.tokenizer,
        output_prefix=arguments.output_prefix,
        output_dir=arguments.output_dir,
        options=TokenizeOptions(
            keys=keys_of(arguments),
            append_eod=arguments.append_eod,
            eod_token=arguments.eod_token,
            shard_tokens=arguments.shard_tokens,
            num_shards=arguments.num_shards,
            is_across_folders=arguments.across_folders,
            on_bad_line=arguments.on_bad_line,
            include=arguments.include,
            exclude=arguments.exclude,
            format=arguments.format,
            txt_documents=arguments.txt_documents,
            max_document_bytes=arguments.max_document_bytes,
            provenance=arguments.provenance,
            engine=arguments.engine,
            special_tokens=arguments.special_tokens,
            bos=arguments.bos,
        ),
        workers=arguments.workers,
        part=arguments.shard,
    )
    sys.stdout.write(str(report))
    return 0


def parse_count_argument(text: str) -> int:
    """Return a count from `500M` or 1000, for argparse."""
    from megatron_cpt.config.settings.values import parse_count

    try:
        return parse_count(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def parse_part_argument(text: str) -> tuple[int, int]:
    """Return (i, n) from `i/n`, for argparse."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(number), int(count)
