"""A stage's length stated in epochs (`training.train_epochs`), turned into iterations from the token files.

The corpus that is counted is the one with the largest share of the mix: instruction data, with completion data beside it.
With `available` tokens in its shards, E epochs are E x available / share / seq_length samples of the stage; incomplete
batches at the end are left out, so the corpus is never read more often than stated.
"""

import argparse
import dataclasses
from fractions import Fraction

from megatron_cpt.config.check import check_config
from megatron_cpt.config.derived import train_iters, train_samples
from megatron_cpt.config.load import LoadedConfig, load_from_arguments
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.errors import DataError


def load_run(arguments: argparse.Namespace) -> LoadedConfig:
    """Return the configuration that `add_run_arguments`' arguments name, its length in iterations.

    Raises: ConfigError; DataError when the length is in epochs and the corpus's token files are missing.
    """
    return with_iterations(load_from_arguments(arguments))


def with_iterations(loaded: LoadedConfig) -> LoadedConfig:
    """Return the configuration with `train_iters` in place of `train_epochs`; its origin tells how.

    Raises: DataError when the epochs cannot be counted; ConfigError when the length does not fit the schedule.
    """
    config = loaded.config
    if config.training.train_epochs is None:
        return loaded
    corpus, available, share = _counted_corpus(config)
    samples = int(Fraction(str(config.training.train_epochs)) * available / share / config.training.seq_length)
    whole = dataclasses.replace(config.training, train_epochs=None, train_iters=None)
    iterations = train_iters(dataclasses.replace(whole, train_samples=samples))
    # a ramp-up that is a fraction of the stage takes more or less with each iteration
    while iterations and train_samples(dataclasses.replace(whole, train_iters=iterations)) > samples:
        iterations -= 1
    if not iterations:
        raise _refused(
            config,
            f"{available:,} tokens of {corpus} are {samples} samples, not one batch of {config.training.global_batch_size}. "
            "Lower training.global_batch_size, or raise the epochs.",
        )
    origin = (
        f"{config.training.train_epochs:g} epochs of {corpus}, {available:,} tokens ({float(share):g} of the mix), from "
        f"{loaded.origins.get('training.train_epochs', 'default')}"
    )
    training = dataclasses.replace(config.training, train_epochs=None, train_iters=iterations)
    resolved = dataclasses.replace(config, training=training)
    origins = loaded.origins | {"training.train_iters": origin, "training.train_epochs": "default"}
    check_config(resolved, origins)
    return LoadedConfig(resolved, origins)


def _counted_corpus(config: RunConfig) -> tuple[str, int, Fraction]:
    """Return the corpus with the largest share of the mix, its tokens and its share."""
    # numpy and the tokenizer's library: only where a length is in epochs
    from megatron_cpt.data.blend_sources import parts_from_list, parts_from_mix

    problems: list[str] = []
    if config.data.train_data_path is not None:
        parts, shares = parts_from_list(config, problems)
    elif config.data.mix:
        parts, shares = parts_from_mix(config, {}, problems)
    else:
        raise _refused(config, "data.rules states no share before the length is known. Use data.mix, or train_tokens.")
    if problems:
        raise _refused(
            config, "the token files cannot be counted:" + "".join(f"\n  - {problem}" for problem in problems)
        )
    largest = max(shares.values())
    names = [name for name, share in shares.items() if share == largest]
    if len(names) > 1:
        raise _refused(
            config, f"{' and '.join(names)} have the same share, so it is not clear whose epochs. State train_tokens."
        )
    return names[0], sum(part.available for part in parts[names[0]]), largest


def _refused(config: RunConfig, why: str) -> DataError:
    return DataError(f"training.train_epochs is {config.training.train_epochs:g}: {why}")
