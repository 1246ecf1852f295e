import math

import numpy as np
import pytest

from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.models.forgetting import (
    as_json,
    compare_with_first,
    compare_with_previous,
    forgetting_table,
    markdown_table,
    results_from_json,
)
from megatron_cpt.evaluate.models.measured import Perplexity
from tests.tolerances import assert_fp64_rounding


def result(model: str, text: str, bits_per_byte: list[float], size: int = 1000) -> Perplexity:
    sizes = [size + index for index in range(len(bits_per_byte))]
    bits = np.array(bits_per_byte) * sizes
    mean = float(bits.sum() / sum(sizes))
    return Perplexity(
        model=model,
        text=text,
        bits_per_byte=mean,
        low=mean - 0.5,
        high=mean + 0.5,
        perplexity=10.0,
        documents=len(sizes),
        tokens=100,
        bytes=sum(sizes),
        context=32,
        stride=32,
        start_token="eos",
        document_nats=(bits * math.log(2)).tolist(),
        document_bytes=sizes,
    )


BASE = [1.0, 2.0, 3.0, 4.0] * 5


def shifted(by: float, noise: float = 0.01) -> list[float]:
    return [value + by + noise * (-1) ** index for index, value in enumerate(BASE)]


def test_a_small_change_in_every_document_is_told_from_noise_by_pairing():
    results = [result("base", "D0", BASE), result("cpt", "D0", shifted(0.02)), result("other", "D0", shifted(0.0))]
    base, cpt, other = compare_with_first(results)
    assert (base.change, base.verdict) == (0.0, "unchanged")
    left_over = (
        0.01 * -10 / sum(range(1000, 1020))
    )  # every second document has a byte more, and the noise of the other sign
    assert_fp64_rounding(
        cpt.change, 0.02 + left_over, roundings=10_000
    )  # a difference of values a hundred times as large
    assert (cpt.verdict, other.verdict) == ("forgot", "unchanged")
    assert cpt.change_high - cpt.change_low < 0.02 < cpt.high - cpt.low


def test_a_series_is_compared_stage_by_stage():
    results = [result("base", "D1", BASE), result("one", "D1", shifted(-0.5)), result("two", "D1", shifted(-0.3))]
    steps = compare_with_previous(results)
    assert [(step.reference, step.verdict) for step in steps] == [
        ("base", "unchanged"), ("base", "learned"), ("one", "forgot"),
    ]  # fmt: skip
    assert "change from the model before" in forgetting_table(steps)
    assert "change from base" in forgetting_table(compare_with_first(results))


def test_lower_bits_per_byte_are_learning():
    changes = compare_with_first([result("base", "D1", BASE), result("cpt", "D1", shifted(-0.5))])
    assert changes[1].verdict == "learned"
    assert "-0.500" in forgetting_table(changes)


def test_models_measured_on_different_documents_are_not_compared():
    with pytest.raises(DataError, match="different documents"):
        compare_with_first([result("base", "D0", BASE), result("cpt", "D0", BASE, size=999)])


def test_a_model_without_a_domain_is_named():
    with pytest.raises(DataError, match="cpt: no result on D1"):
        compare_with_first([result("base", "D0", BASE), result("cpt", "D0", BASE), result("base", "D1", BASE)])


def test_results_survive_json():
    results = [result("base", "D0", BASE), result("cpt", "D0", shifted(0.1))]
    assert results_from_json(as_json(results, compare_with_first(results))) == results
    with pytest.raises(DataError, match="not those of an evaluation"):
        results_from_json({"results": [{"model": "x"}]})


def test_a_table_is_aligned_markdown():
    table = markdown_table(["name", "n"], [["a", "1"], ["long name", "22"]], num_left=1)
    assert table.split("\n") == ["| name      |  n |", "| --------- | -: |", "| a         |  1 |", "| long name | 22 |"]
