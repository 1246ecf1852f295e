"""A stage's length stated in epochs (`training.train_epochs`), turned into iterations from the token files.

Epochs are counted on the corpus with the largest share of the mix, for example instruction data mixed with completion
data. With `available` tokens in its shards, E epochs are E x available / share / seq_length samples of the stage;
incomplete batches at the end are left out, so the corpus is never read more often than stated.

With `data.rules` shares depend on the length (`epochs 2` of a corpus is a smaller part of a longer stage). The length is then
the longest one that the rules allow with the corpus that has the largest share read at most E times.
"""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

from megatron_cpt.config.checks.all import check_config
from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.derived import train_iters, train_samples
from megatron_cpt.config.settings.schema import RunConfig, TrainingConfig
from megatron_cpt.errors import DataError

_GRID = 200
"""Lengths that are tried with data.rules, equal factors apart."""


def with_iterations(loaded: LoadedConfig, estimates: Mapping[str, int] | None = None) -> LoadedConfig:
    """Return the configuration with `train_iters` instead of `train_epochs`; its origin records the computation.

    `estimates` are tokens of corpora that have no token files yet (`start/length.py`).

    Raises: DataError when the epochs cannot be counted; ConfigError when the length does not fit the schedule.
    """
    config = loaded.config
    if config.training.train_epochs is None:
        return loaded
    if config.data.rules:
        iterations, corpus, available, share = _longest_by_rules(config, estimates or {})
    else:
        corpus, available, share = _counted_corpus(config, estimates or {})
    samples = int(Fraction(str(config.training.train_epochs)) * available / share / config.training.seq_length)
    if not config.data.rules:
        iterations = train_iters(_length(config.training, train_samples=samples))
        # a ramp-up that is a fraction of the stage takes more or less with each iteration
        while iterations and train_samples(_length(config.training, train_iters=iterations)) > samples:
            iterations -= 1
    if not iterations:
        raise _refused(
            config.training,
            f"{available:,} tokens of {corpus} are {samples} samples, not one batch of {config.training.global_batch_size}. "
            "Lower training.global_batch_size, or raise the epochs.",
        )
    estimated = " by an estimate" if estimates else ""
    origin = (
        f"{config.training.train_epochs:g} epochs of {corpus}, {available:,} tokens{estimated} ({float(share):g} of the mix), from "
        f"{loaded.origins.get('training.train_epochs', 'default')}"
    )
    training = dataclasses.replace(config.training, train_epochs=None, train_iters=iterations)
    resolved = dataclasses.replace(config, training=training)
    origins = loaded.origins | {"training.train_iters": origin, "training.train_epochs": "default"}
    check_config(resolved, origins)
    return LoadedConfig(resolved, origins)


def _counted_corpus(config: RunConfig, estimates: Mapping[str, int]) -> tuple[str, int, Fraction]:
    """Return the corpus with the largest share of the mix, its tokens and its share."""
    # numpy and the tokenizer's library: only where a length is in epochs
    from megatron_cpt.data.blend.sources import parts_from_list, parts_from_mix

    problems: list[str] = []
    if config.data.train_data_path is not None:
        parts, shares = parts_from_list(config, problems)
    else:
        parts, shares = parts_from_mix(config, {}, problems, estimates)
    if problems:
        raise _refused(
            config.training, "the token files cannot be counted:" + "".join(f"\n  - {problem}" for problem in problems)
        )
    largest = max(shares.values())
    names = [name for name, share in shares.items() if share == largest]
    if len(names) > 1:
        raise _refused(
            config.training,
            f"{' and '.join(names)} have the same share, so it is not clear whose epochs. State train_tokens.",
        )
    return names[0], sum(part.available for part in parts[names[0]]), largest


def _longest_by_rules(config: RunConfig, estimates: Mapping[str, int]) -> tuple[int, str, int, Fraction]:
    """Return the iterations of the longest stage, and of its corpus with the largest share name, tokens and share."""
    from megatron_cpt.data.blend.sources import available_parts, drawn_by_rules

    problems: list[str] = []
    parts = available_parts(config, {}, problems, estimates)
    if problems:
        raise _refused(
            config.training, "the token files cannot be counted:" + "".join(f"\n  - {problem}" for problem in problems)
        )
    epochs = Fraction(str(config.training.train_epochs))
    available = {corpus: sum(part.available for part in group) for corpus, group in parts.items()}

    def largest(iterations: int) -> tuple[str, int, Fraction] | str:
        """Return the corpus that has the largest share of a stage of this length, or why there is no such stage."""
        budget = train_samples(_length(config.training, train_iters=iterations)) * config.training.seq_length
        try:
            _, shares = drawn_by_rules(config, parts, budget)
        except DataError as problem:
            return str(problem)
        corpus = max(shares, key=lambda name: (shares[name], name))
        if shares[corpus] * budget > epochs * available[corpus]:
            return f"{corpus} would be read more often in {iterations:,} iterations."
        return corpus, available[corpus], shares[corpus]

    # the corpus with the largest share has a part of at least 1 / corpora
    most = int(len(parts) * epochs * max(available.values(), default=0) / config.training.seq_length)
    longest = train_iters(_length(config.training, train_samples=max(most, 1)))
    # rules may also fit no short stage, so that lengths that do are looked for before the longest of them is
    tried = sorted({1, *(round(longest ** (step / _GRID)) for step in range(_GRID + 1))})
    fitting = [iterations for iterations in tried if not isinstance(largest(iterations), str)]
    if not fitting:
        raise _refused(config.training, f"no length fits data.rules. The longest tried: {largest(longest)}")
    first, beyond = fitting[-1], longest + 1
    beyond = next((iterations for iterations in tried if iterations > first), beyond)
    while beyond - first > 1:
        middle = (first + beyond) // 2
        first, beyond = (middle, beyond) if not isinstance(largest(middle), str) else (first, middle)
    found = largest(first)
    assert not isinstance(found, str)
    return first, *found


def _length(
    training: TrainingConfig, *, train_samples: int | None = None, train_iters: int | None = None
) -> TrainingConfig:
    return dataclasses.replace(training, train_epochs=None, train_samples=train_samples, train_iters=train_iters)


def _refused(training: TrainingConfig, why: str) -> DataError:
    return DataError(f"training.train_epochs is {training.train_epochs:g}: {why}")
