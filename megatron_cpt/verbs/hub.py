"""Push models to the Hugging Face Hub and fetch models and data sets from it.

  push       send a folder as one commit; weight files larger than --max-shard-size are re-sharded for it
  download   fetch a repository, or the part that --include names; an interrupted download resumes

HF_ENDPOINT names another server, HF_TOKEN (or `hf auth login`) who you are. --dry-run needs no network.

Examples:
  megatron-cpt hub push models/danish-7b --repo my-team/danish-7b --max-shard-size 2GB --private --dry-run
  megatron-cpt hub download Qwen/Qwen3-0.6B --to models/Qwen3-0.6B
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    push = subparsers.add_parser("push", help="send a folder")
    push.add_argument(
        "folder", type=Path, metavar="FOLDER", help="Hugging Face model folder, or any with --kind dataset"
    )
    push.add_argument("--repo", required=True, metavar="NAME", help="OWNER/NAME; it is created where it does not exist")
    push.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="largest weight file (default: 2GB)")
    push.add_argument("--private", action="store_true", help="create it as a private repository")
    push.add_argument("--base-model", metavar="NAME", help="base model that the card names, where the export has none")
    push.add_argument("--evaluation", type=Path, metavar="FILE", help="Markdown report that the card quotes")
    push.add_argument("--message", help="what the commit says (default: Upload FOLDER)")
    push.add_argument("--dry-run", action="store_true", help="say what would be sent and stop")
    download = subparsers.add_parser("download", help="fetch a repository")
    download.add_argument("repo", metavar="REPO", help="OWNER/NAME")
    download.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for the files")
    download.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="only these: '*.parquet' eu/*")
    download.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="all but these: '*.bin'")
    download.add_argument("--workers", type=int, default=8, help="files at a time (default: 8)")
    for action in (push, download):
        action.add_argument("--kind", choices=("model", "dataset"), default="model", help="default: model")
        action.add_argument("--revision", help="branch (download: or tag or commit; default: main)")


def run(arguments: argparse.Namespace) -> None:
    # imported here: torch takes seconds to start
    from megatron_cpt.checkpoint.huggingface.hub import check_repo_name, download, plan_push, push
    from megatron_cpt.log import format_bytes
    from megatron_cpt.verbs.model_arguments import parse_bytes

    if arguments.action == "download":
        count, size = download(
            arguments.repo,
            arguments.to,
            kind=arguments.kind,
            revision=arguments.revision,
            include=arguments.include,
            exclude=arguments.exclude,
            workers=arguments.workers,
        )
        sys.stdout.write(f"{arguments.to}: {count:,} files, {format_bytes(size)} of {arguments.repo}\n")
        return
    max_shard_bytes = parse_bytes(arguments.max_shard_size)
    check_repo_name(arguments.repo)
    plan = plan_push(
        arguments.folder,
        max_shard_bytes,
        arguments.kind,
        base=arguments.base_model,
        evaluation=arguments.evaluation,
    )
    sys.stdout.write(str(plan))
    branch = f" (branch {arguments.revision})" if arguments.revision else ""
    if arguments.dry_run:
        access = ", private if it is created" if arguments.private else ""
        sys.stdout.write(f"dry run: nothing was sent to the {arguments.kind} {arguments.repo}{branch}{access}\n")
        return
    sys.stdout.flush()
    address = push(
        plan,
        arguments.repo,
        max_shard_bytes,
        kind=arguments.kind,
        revision=arguments.revision,
        private=arguments.private,
        message=arguments.message,
    )
    sys.stdout.write(f"sent to {arguments.repo}{branch}: {address}\n")
