"""Submission of one stage: check everything on this node first, then hand the job to its scheduler."""

import argparse

from megatron_cpt.config.derived import world_size
from megatron_cpt.config.load import LoadedConfig
from megatron_cpt.launch.local import run_local
from megatron_cpt.launch.run_dir import run_dir


def submit_train(loaded: LoadedConfig, arguments: argparse.Namespace) -> int:
    """Start training of one stage; return its exit code (local)."""
    config = loaded.config
    check_data(loaded)
    return run_local(
        run_dir(config),
        run_arguments(arguments),
        num_ranks=world_size(config),
        max_restarts=config.launch.max_restarts,
    )


def check_data(loaded: LoadedConfig) -> None:
    """Plan the blend, as the first rank will.

    Raises: DataError when a corpus is missing, damaged or too small.
    """
    from megatron_cpt.data.blend import plan_blend  # only here: it reads indices with numpy

    if loaded.config.data.mix or loaded.config.data.train_data_path:
        plan_blend(loaded.config)


def run_arguments(arguments: argparse.Namespace) -> list[str]:
    """Return the command-line arguments that make `train` load the same configuration."""
    options = ["--task", str(arguments.task), "--params", arguments.params, "--size", arguments.size]
    options += ["--variant", arguments.variant]
    if arguments.site:
        options += ["--site", str(arguments.site)]
    return [*options, *arguments.overrides]
