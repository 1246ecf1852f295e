"""Checks of the settings that transform samples: fill-in-the-middle, weights of prompts."""

from collections.abc import Iterator

from megatron_cpt.config.checks.problem import Problem
from megatron_cpt.config.settings.fields import nearest
from megatron_cpt.config.settings.schema import RunConfig

FIM_TOKENS = ("data.fim_prefix_token", "data.fim_middle_token", "data.fim_suffix_token")


def sample_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what does not fit together in the treatment of samples."""
    data = config.data
    for name in ("fim_rate", "fim_spm_rate", "prompt_loss_weight"):
        value = getattr(data, name)
        if not 0 <= value <= 1:
            yield Problem((f"data.{name}",), f"data.{name} is {value:g}. A share lies between 0 and 1.")
    missing = [key for key in FIM_TOKENS if getattr(data, key.partition(".")[2]) is None]
    if data.fim_rate and missing:
        yield Problem(
            ("data.fim_rate", *missing),
            f"data.fim_rate is {data.fim_rate:g} and {' and '.join(missing)} not given. Name the tokenizer's three tokens.",
        )
    for name in data.fim_corpora:
        if name not in data.corpora:
            yield Problem(
                ("data.fim_corpora", "data.corpora"),
                f"data.fim_corpora names {name}, which is no corpus of data.corpora. {nearest(name, list(data.corpora))}",
            )
    if data.fim_corpora and not data.fim_rate:
        yield Problem(
            ("data.fim_corpora", "data.fim_rate"),
            "data.fim_corpora has no effect while data.fim_rate is 0. Set a rate, or remove it.",
        )
