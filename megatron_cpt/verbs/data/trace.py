"""Say which file and line a tokenized document came from, or what a run read in an iteration.

Documents and tokens are counted from 0, lines from 1, iterations from 1 as in the log.

Example:
  megatron-cpt data trace tokens/D1/a_text_document --document 1234 --tokenizer models/base
  megatron-cpt data trace --run runs/ja/llama3-8b/50B/main --iteration 120-121
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.config.settings.iteration_ranges import parse_range
from megatron_cpt.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is traced: documents or tokens of a shard, or iterations of a run."""
    parser.add_argument("prefix", type=Path, nargs="?", help="prefix of the shard (.bin and .idx are left out)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", type=int, nargs="+", help="numbers of documents")
    what.add_argument("--token", type=int, nargs="+", help="positions of tokens in the shard")
    what.add_argument("--iteration", metavar="N[-M]", help="iterations of --run: the documents of each sample")
    parser.add_argument("--run", type=Path, metavar="DIR", help="directory of the run whose iterations are traced")
    parser.add_argument("--tokenizer", type=Path, help="show the beginning of the text, decoded by this tokenizer")


def run(arguments: argparse.Namespace) -> int | None:
    """Print a line per document; return 0."""
    if arguments.iteration is not None:
        return _trace_run(arguments)
    if arguments.prefix is None or arguments.run is not None:
        raise DataError("data trace: --document and --token need the prefix of a shard, --iteration needs --run.")
    # numpy and the tokenizer libraries are slow to import; --help must not wait for them
    from megatron_cpt.data.audit.trace import trace_documents, trace_token
    from megatron_cpt.data.tokenizer.interface import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    if arguments.document is not None:
        origins = [
            origin for number in arguments.document for origin in trace_documents(arguments.prefix, number, tokenizer)
        ]
    else:
        origins = [trace_token(arguments.prefix, position, tokenizer) for position in arguments.token]
    for origin in origins:
        sys.stdout.write(f"{origin}\n")
        if tokenizer:
            sys.stdout.write(f"  {tokenizer.decode(origin.ids[:60])!r}\n")
    return 0


def _trace_run(arguments: argparse.Namespace) -> int:
    if arguments.run is None or arguments.prefix is not None or arguments.tokenizer is not None:
        raise DataError("data trace: --iteration needs --run DIR, and takes no prefix and no --tokenizer.")
    try:
        first, last = parse_range(arguments.iteration)
    except ValueError as problem:
        raise DataError(f"--iteration: {problem}.") from None
    from megatron_cpt.train.tools.step_trace import RunTrace  # torch and megatron take seconds

    trace = RunTrace(arguments.run)
    for iteration in range(first, last + 1):
        if trace.is_skipped(iteration):
            sys.stdout.write(f"iteration {iteration}: skipped, nothing was trained on\n")
        for sample in trace.samples(iteration):
            sys.stdout.write(f"{sample}\n")
    return 0
