"""The configuration of the run that a verb's arguments name, its length in iterations."""

import argparse

from megatron_cpt.config.loading.resolve import LoadedConfig, load_from_arguments
from megatron_cpt.data.blend.epochs import with_iterations
from megatron_cpt.start.length import with_length


def load_run(arguments: argparse.Namespace) -> LoadedConfig:
    """Return the configuration that `add_run_arguments`' arguments name, its length in iterations.

    Raises: ConfigError; DataError when the length is in epochs and the corpus's token files are missing.
    """
    return with_iterations(load_from_arguments(arguments))


def load_planned(arguments: argparse.Namespace) -> tuple[LoadedConfig, str]:
    """Return the same before the data are tokenized, and how the length was estimated: empty where it is known.

    Raises: ConfigError; DataError when a length in epochs can be neither counted nor estimated.
    """
    return with_length(load_from_arguments(arguments))
