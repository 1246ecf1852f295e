"""Print the resolved configuration of a run, where each value comes from, or Megatron-LM flags.

Layers, later ones win: defaults, params file, task file, the task's size, its variant, site file, KEY=VALUE.

Example:
  megatron-cpt show-config --task tasks/template --params llama3-8b --size 50B training.micro_batch_size=2
  megatron-cpt show-config --task tasks/template --params llama3-8b --size 50B --explain optimizer.lr
  megatron-cpt show-config --task tasks/template --params llama3-8b --size 50B --format megatron-args

Exits with 2 and names every mistake at once when the configuration cannot work.
"""

import argparse
import json
import logging
import os
import shlex
import sys

from megatron_cpt.config.loading.explain import explain
from megatron_cpt.config.loading.resolve import LoadedConfig, add_run_arguments, load_from_arguments, resolved_text
from megatron_cpt.config.megatron.arguments import megatron_flags, settings_without_flag
from megatron_cpt.config.settings.fields import plain
from megatron_cpt.data.blend.epochs import with_iterations
from megatron_cpt.errors import DataError
from megatron_cpt.launch.submission.aurora_variables import add_variable_arguments, with_variables

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's arguments and the parts to print."""
    add_run_arguments(parser)
    add_variable_arguments(parser)
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="value, origin and meaning of a setting, a section, or (without KEY) of everything",
    )
    parser.add_argument(
        "--format",
        choices=("yaml", "json", "megatron-args"),
        default="yaml",
        help="yaml with origins (default), json, or the equivalent Megatron-LM arguments",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the configuration and return 0."""
    if arguments.explain and "=" in arguments.explain:  # an override that followed a bare --explain
        arguments.overrides.append(arguments.explain)
        arguments.explain = ""
    if arguments.from_environment or arguments.finetune or arguments.universal_checkpoint:
        arguments.overrides = with_variables(arguments, os.environ if arguments.from_environment else {})
    loaded = load_from_arguments(arguments)
    try:
        loaded = with_iterations(loaded)
    except DataError as problem:  # the token files may come later, or lie on another machine
        logger.warning("%s", problem)
    if arguments.explain is not None:
        sys.stdout.write(explain(loaded, arguments.explain))
    elif arguments.format == "json":
        sys.stdout.write(json.dumps(plain(loaded.config), indent=2, ensure_ascii=False) + "\n")
    elif arguments.format == "megatron-args":
        sys.stdout.write(_megatron_args(loaded))
    else:
        sys.stdout.write(resolved_text(loaded))
    return 0


def _megatron_args(loaded: LoadedConfig) -> str:
    """Return one flag with its value per line; warn about settings without a Megatron-LM flag."""
    for key in settings_without_flag(loaded.config):
        logger.warning("%s has no Megatron-LM flag: it is not in the list", key)
    lines: list[list[str]] = []
    for item in megatron_flags(loaded.config):
        if item.startswith("--"):
            lines.append([item])
        else:
            lines[-1].append(item)
    return "".join(shlex.join(line) + "\n" for line in lines)
