"""Look after checkpoints: list, verify, inspect, compare, prune, protect, copy, adopt.

ROOT is a run's `checkpoints` folder; DIR is one checkpoint in it, or a ROOT, which means its newest good one.

Examples:
  megatron-cpt checkpoint list runs/t/p/50B/main/checkpoints
  megatron-cpt checkpoint verify runs/t/p/50B/main/checkpoints
  megatron-cpt checkpoint prune runs/t/p/50B/main/checkpoints --keep-last 3 --keep-every 1000 --dry-run
  megatron-cpt checkpoint inspect runs/t/p/50B/main/checkpoints/iter_0001000 --tensors
  megatron-cpt checkpoint diff runs/t/p/50B/main/checkpoints/iter_0001000 runs/t/p/50B/main/checkpoints/iter_0002000
  megatron-cpt checkpoint protect runs/t/p/50B/main/checkpoints 1000 2000
  megatron-cpt checkpoint adopt old/iter_0001000 --params llama3-1b
  megatron-cpt checkpoint copy runs/t/p/50B/main/checkpoints /archive/t
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    part = actions.add_parser("list", help="a line per complete checkpoint")
    part.add_argument("root", type=Path, metavar="ROOT", help="a run's `checkpoints` folder")
    part = actions.add_parser("verify", help="check every file of one or all checkpoints; exit 1 when one is damaged")
    part.add_argument("path", type=Path, metavar="ROOT|DIR", help="a `checkpoints` folder, or one checkpoint")
    part.add_argument("--size", action="store_true", help="check sizes only, not hashes")
    part.add_argument("--sha256", action="store_true", help="a line per file for sha256sum too, of what is good")
    part = actions.add_parser("inspect", help="what a checkpoint holds")
    part.add_argument("path", type=Path, metavar="DIR", help="a checkpoint, or a folder of them")
    part.add_argument("--tensors", action="store_true", help="a line per tensor")
    part = actions.add_parser("diff", help="how two checkpoints differ in settings and weights; exit 1 when they do")
    part.add_argument("left", type=Path, metavar="DIR", help="the one")
    part.add_argument("right", type=Path, metavar="DIR", help="the other")
    part = actions.add_parser("prune", help="delete superseded checkpoints, never the only good one")
    part.add_argument("root", type=Path, metavar="ROOT", help="a run's `checkpoints` folder")
    part.add_argument(
        "--keep-last", type=int, metavar="K", help="newest checkpoints to keep (all; give this or --quota)"
    )
    part.add_argument("--keep-every", type=int, metavar="N", help="keep multiples of N too")
    part.add_argument("--protect", type=int, action="append", default=[], metavar="ITERATION", help="keep this one too")
    part.add_argument(
        "--quota", metavar="SIZE", help="delete the oldest unprotected ones beyond this size, such as 2TB"
    )
    part.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    part = actions.add_parser("protect", help="never delete these iterations")
    part.add_argument("root", type=Path, metavar="ROOT", help="a run's `checkpoints` folder")
    part.add_argument("iterations", type=int, nargs="+", metavar="ITERATION", help="numbers of iterations")
    part.add_argument("--remove", action="store_true", help="lift the protection")
    part = actions.add_parser("copy", help="copy with checksums; resumes after an interruption")
    part.add_argument("path", type=Path, metavar="ROOT|DIR", help="a `checkpoints` folder, or one checkpoint")
    part.add_argument("target", type=Path, metavar="TARGET_ROOT", help="folder for the copy")
    part = actions.add_parser("adopt", help="write a manifest for a torch_dist folder that Megatron-LM made")
    part.add_argument("path", type=Path, metavar="DIR", help="a checkpoint, or a folder of them")
    part.add_argument("--params", required=True, metavar="NAME", help="params file that describes its model")


def run(arguments: argparse.Namespace) -> int | None:
    action = {
        "list": _list,
        "verify": _verify,
        "inspect": _inspect,
        "diff": _diff,
        "prune": _prune,
        "protect": _protect,
        "copy": _copy,
        "adopt": _adopt,
    }[arguments.action]
    return action(arguments)


def _list(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.torch_dist.retention import read_protected
    from megatron_cpt.checkpoint.torch_dist.table import checkpoint_table

    sys.stdout.write(checkpoint_table(arguments.root, read_protected(arguments.root)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.torch_dist.content import sha256_lines
    from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest, verify_checkpoint
    from megatron_cpt.checkpoint.torch_dist.megatron_arguments import check_safe  # torch

    damaged = 0
    for directory in _directories(arguments.path, complete=False):
        try:
            verify_checkpoint(directory, "size" if arguments.size else "full")
            check_safe(directory)
        except CheckpointError as problem:
            damaged += 1
            sys.stdout.write(f"DAMAGED {problem}\n")
        else:
            sys.stdout.write(f"good    {directory}\n")
            if arguments.sha256:
                names = ["manifest.json", *read_manifest(directory)["files"]]
                sys.stdout.write(sha256_lines(directory, names))
    return 1 if damaged else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.inspection import describe_checkpoint  # torch
    from megatron_cpt.checkpoint.torch_dist.mcore import find_checkpoint

    sys.stdout.write(describe_checkpoint(find_checkpoint(arguments.path), with_tensors=arguments.tensors))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.inspection import diff_checkpoints  # torch
    from megatron_cpt.checkpoint.torch_dist.mcore import find_checkpoint

    difference = diff_checkpoints(find_checkpoint(arguments.left), find_checkpoint(arguments.right))
    sys.stdout.write(difference.text())
    same = not (difference.only_left or difference.only_right or difference.shapes or difference.values)
    return 0 if same else 1


def _prune(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.torch_dist.retention import prune
    from megatron_cpt.verbs.model_arguments import parse_bytes

    if arguments.keep_last is None and arguments.quota is None:
        raise CheckpointError("prune: nothing says what is superseded. Give --keep-last K, --quota SIZE, or both.")
    deleted = prune(
        arguments.root,
        arguments.keep_last,
        arguments.keep_every,
        arguments.protect,
        parse_bytes(arguments.quota) if arguments.quota else None,
        mode="full",
        dry_run=arguments.dry_run,
    )
    sys.stdout.write("".join(f"{'would delete' if arguments.dry_run else 'deleted'} {path}\n" for path in deleted))
    return 0


def _protect(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.torch_dist.mcore import list_checkpoints
    from megatron_cpt.checkpoint.torch_dist.retention import read_protected, write_protected

    wanted = set(arguments.iterations)
    absent = wanted - set(list_checkpoints(arguments.root))
    if absent and not arguments.remove:
        raise CheckpointError(
            f"{arguments.root}: no complete checkpoint {sorted(absent)[0]}. `checkpoint list` shows them."
        )
    held = read_protected(arguments.root)
    write_protected(arguments.root, held - wanted if arguments.remove else held | wanted)
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.torch_dist.copying import copy_checkpoint

    for directory in _directories(arguments.path):
        sys.stdout.write(f"{copy_checkpoint(directory, arguments.target)}\n")
    return 0


def _adopt(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.inspection import adopt_checkpoint  # torch
    from megatron_cpt.verbs.model_arguments import params_model

    adopt_checkpoint(arguments.path, params_model(arguments.params))
    return 0


def _directories(path: Path, *, complete: bool = True) -> list[Path]:
    """Return the checkpoint that `path` is, or all in it; `complete`: those with a readable manifest only."""
    from megatron_cpt.checkpoint.torch_dist.mcore import (
        MANIFEST,
        checkpoint_dir,
        iteration_of,
        iterations_on_disk,
        list_checkpoints,
    )

    if iteration_of(path) is not None or (path / MANIFEST).exists():
        return [path]
    found = [
        checkpoint_dir(path, iteration) for iteration in (list_checkpoints if complete else iterations_on_disk)(path)
    ]
    if not found:
        raise CheckpointError(f"{path}: no complete checkpoint. A folder with iter_NNNNNNN or release in it is needed.")
    return found
