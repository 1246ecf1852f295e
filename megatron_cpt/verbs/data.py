"""Look after documents and token files: validate, repair, audit, trace, merge and more.

Each sub-verb is a module `megatron_cpt.verbs.data_NAME` with the same two functions as a verb.

Example: megatron-cpt data validate --input 'corpora/**/*.jsonl.zst'
"""

import argparse
import importlib

SUB_VERBS = {
    "validate": "read documents and report every bad line",
    "repair": "rewrite documents without the bad lines",
    "extract": "decompress documents into a mirrored tree",
    "merge-files": "group many small document files into larger ones",
    "audit": "prove that token files hold exactly their source documents",
    "trace": "say which file and line a tokenized document came from",
    "merge": "join token shards into one",
    "adopt": "check token shards of another tool and write their manifests",
    "dedup": "remove exact and near-duplicate documents",
    "decontaminate": "remove documents that hold passages of evaluation sets",
    "sample": "take a random subset, by field value or score",
    "split": "hold out a fixed validation set by document hash",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "sub-verbs:\n" + "\n".join(f"  {name:<20} {text}" for name, text in SUB_VERBS.items())
    parser.add_argument("sub_verb", choices=list(SUB_VERBS), metavar="SUB_VERB", help="what to do")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the sub-verb")


def run(arguments: argparse.Namespace) -> int | None:
    name = arguments.sub_verb
    module = importlib.import_module(f"megatron_cpt.verbs.data_{name.replace('-', '_')}")
    summary, _, description = (module.__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"megatron-cpt data {name}",
        description=f"{summary}\n{description}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments.rest))
