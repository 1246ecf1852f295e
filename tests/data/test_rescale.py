"""Budgets by rules are exact; mixing lists keeps every digit."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.blend.rescale_table import rescale_table
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.lists.rescale import Rule, mix_lists, rescale
from megatron_cpt.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
AVAILABLE = [
    DataEntry(prefix="tok/web/a", tokens=1001, corpus="web"),
    DataEntry(prefix="tok/web/b", tokens=2003, corpus="web"),
    DataEntry(prefix="tok/flan/c", tokens=507, corpus="flan"),
    DataEntry(prefix="tok/math/d", tokens=99, corpus="math"),
]


def rule(pattern, kind, value):
    return Rule(pattern=pattern, kind=kind, value=Fraction(value))


def tokens(entries):
    return [entry.tokens for entry in entries]


def test_ratios_without_a_budget_round_every_line_up():
    rules = [rule("flan", "ratio", "0.5"), rule("math", "ratio", 4), rule("*", "ratio", "0.0323")]
    assert tokens(rescale(AVAILABLE, rules)) == [33, 65, 254, 396]


def test_ratios_with_a_budget_state_proportions_and_meet_it_exactly():
    rules = [rule("flan", "ratio", "0.5"), rule("*", "ratio", 1)]
    drawn = rescale(AVAILABLE, rules, 1000)
    assert sum(tokens(drawn)) == 1000
    assert tokens(drawn) == [298, 597, 76, 29]  # 1001, 2003, 253.5, 99 of 3356.5


def test_shares_split_a_budget_and_must_make_it_up():
    rules = [rule("web", "share", "0.7"), rule("flan", "share", "0.2"), rule("math", "share", "0.1")]
    drawn = rescale(AVAILABLE, rules, 1000)
    assert [sum(tokens(drawn)[:2]), *tokens(drawn)[2:]] == [700, 200, 100]
    with pytest.raises(DataError, match="shares and epochs make up 0.9 of the budget"):
        rescale(AVAILABLE, [*rules[:2], rule("math", "share", 0)], 1000)
    with pytest.raises(DataError, match="make up 1.7"):
        rescale(AVAILABLE, [*rules[:2], rule("math", "share", "0.8")], 1000)


def test_epochs_are_exact_and_weights_divide_the_rest():
    rules = [rule("math", "epochs", "2.5"), rule("flan", "weight", 1), rule("web", "weight", 3)]
    drawn = rescale(AVAILABLE, rules, 1000)
    assert tokens(drawn)[3] == 248
    assert sum(tokens(drawn)[:2]) == 564
    assert tokens(drawn)[2] == 188


def test_two_pools_split_the_budget_before_the_rules():
    drawn = rescale(AVAILABLE, [], 1000, base="web", base_ratio=Fraction("0.4"))
    assert sum(tokens(drawn)[:2]) == 400
    assert tokens(drawn)[2:] == [502, 98]


def test_a_cap_moves_what_a_shard_cannot_give_to_the_others():
    rules = [rule("math", "share", "0.5"), rule("*", "share", "0.5")]
    drawn = rescale(AVAILABLE, rules, 2000, cap=Fraction(2))
    assert tokens(drawn)[3] == 198
    assert sum(tokens(drawn)) == 2000
    with pytest.raises(DataError, match="give 7,220 at 2 epochs"):
        rescale(AVAILABLE, rules, 8000, cap=Fraction(2))


def test_a_shard_without_a_rule_and_a_rule_without_a_shard_are_refused():
    with pytest.raises(DataError, match="no rule names 2 shards"):
        rescale(AVAILABLE, [rule("web", "ratio", 1)])
    with pytest.raises(DataError, match="no shard is left for fran"):
        rescale(AVAILABLE, [rule("fran", "ratio", 1), rule("*", "ratio", 1)])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**13), min_size=2, max_size=12),
    ratios=st.lists(st.fractions("1/1000", 8), min_size=12, max_size=12),
    budget=st.integers(1, 10**14),
    base=st.fractions(0, 1),
)
def test_a_budget_is_always_met_to_the_token_and_proportions_within_one(sizes, ratios, budget, base):
    entries = [DataEntry(prefix=f"p{index:02d}", tokens=size) for index, size in enumerate(sizes)]
    rules = [Rule(pattern=e.prefix, kind="ratio", value=r) for e, r in zip(entries, ratios, strict=False)]
    drawn = {e.prefix: e.tokens for e in rescale(entries, rules, budget)}
    assert sum(drawn.values()) == budget
    total = sum(size * ratio for size, ratio in zip(sizes, ratios, strict=False))
    for entry, ratio in zip(entries, ratios, strict=False):
        assert abs(drawn.get(entry.prefix, 0) - budget * entry.tokens * ratio / total) < 1
    pools = {e.prefix: e.tokens for e in rescale(entries, rules, budget, base="p00", base_ratio=base)}
    assert sum(pools.values()) == budget
    assert abs(pools.get("p00", 0) - budget * base) < 1


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(10, 10**9), min_size=1, max_size=8), cap=st.integers(1, 5), part=st.fractions(0, 1))
def test_no_shard_exceeds_its_cap_and_the_budget_is_still_met(sizes, cap, part):
    entries = [DataEntry(prefix=f"p{index}", tokens=size) for index, size in enumerate(sizes)]
    rules = [Rule(pattern=e.prefix, kind="weight", value=Fraction(i + 1)) for i, e in enumerate(entries)]
    budget = max(1, int(part * sum(sizes) * cap))
    drawn = rescale(entries, rules, budget, cap=Fraction(cap))
    assert sum(tokens(drawn)) == budget
    assert all(e.tokens <= cap * sizes[int(e.prefix[1:])] for e in drawn)


def test_the_table_counts_and_refuses_too_many_epochs():
    drawn = rescale(AVAILABLE, [rule("math", "share", "0.5"), rule("*", "share", "0.5")], 1000)
    options = {"seq_length": 64, "global_batch_size": 4}
    with pytest.raises(DataError, match=r"1 shards would be read more than 4 times: tok/math/d \(5.051\)"):
        rescale_table(AVAILABLE, drawn, drawn, 1000, max_epochs=Fraction(4), **options)
    table = rescale_table(AVAILABLE, drawn, drawn, 1000, max_epochs=Fraction(6), **options)
    assert "total 1,000 tokens (1K), budget 1,000: 4 iterations, 16 samples of 64" in table


@settings(max_examples=40, deadline=None)
@given(
    lists=st.lists(
        st.tuples(
            st.fractions("1/100", 100), st.lists(st.fractions(Fraction(1, 10**9), 10**9), min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_mixed_weights_are_exact(lists):
    entries = [
        (w, [DataEntry(prefix=f"{i}/{j}", weight=x, corpus="c") for j, x in enumerate(weights)])
        for i, (w, weights) in enumerate(lists)
    ]
    mixed = mix_lists(entries)
    assert sum(entry.weight for entry in mixed) == 1
    first_sum = sum(entry.weight for entry in mixed[: len(lists[0][1])])
    assert first_sum == lists[0][0] / sum(w for w, _ in lists)


def test_a_shard_of_two_mixed_lists_is_written_once_with_the_sum_of_its_weights():
    one, half = Fraction(1), Fraction(1, 2)
    first = [DataEntry(prefix="d/x", weight=one, corpus="c"), DataEntry(prefix="d/y", weight=one, corpus="c")]
    mixed = mix_lists([(half, first), (half, [DataEntry(prefix="./d//x", weight=one, corpus="c")])])
    assert [(entry.prefix, entry.weight) for entry in mixed] == [("d/x", Fraction(3, 4)), ("d/y", Fraction(1, 4))]
    with pytest.raises(DataError, match="d/x is in the corpora c and other"):
        mix_lists([(half, first), (half, [DataEntry(prefix="d/x", weight=one, corpus="other")])])


def test_a_corpus_s_name_names_that_corpus_only_not_those_whose_names_begin_with_it():
    entries = [DataEntry(prefix=f"tok/{name}/a", tokens=1000, corpus=name) for name in ("D1", "D10", "D2")]
    drawn = rescale(entries, [rule("D1", "share", "0.5"), rule("*", "share", "0.5")], 1000)
    assert tokens(drawn) == [500, 250, 250]
    pools = rescale(entries, [], 1000, base="D1", base_ratio=Fraction("0.4"))
    assert tokens(pools) == [400, 300, 300]


def test_repeated_shards_and_amounts_that_are_not_positive_are_refused():
    with pytest.raises(DataError, match=r"1 shards are named more than once \(.*tok/web/a\)"):
        rescale([*AVAILABLE, DataEntry(prefix="tok/./web/a", tokens=5)], [], 1000)
    with pytest.raises(DataError, match="the budget is 0 tokens"):
        rescale(AVAILABLE, [], 0)
    with pytest.raises(DataError, match="the cap is 0 epochs"):
        rescale(AVAILABLE, [], 10, cap=Fraction(0))


def test_llm_jp_s_dolmino_ratios_give_their_numbers_without_awk_s_rounding():
    """The list and the ratios of LLM-jp's update_train_data_to_50B.sh, which sums to 55.8B."""
    sizes = {"dclm/0": 34024238242, "flan/all": 19020984357, "pes2o/all": 65556621655, "wiki/all": 4127779989}
    entries = [DataEntry(prefix=f"/tok/{name}", tokens=size) for name, size in sizes.items()]
    rules = [
        rule("/dclm/", "ratio", "0.0323"),
        rule("/flan/", "ratio", "0.5"),
        rule("/pes2o/", "ratio", "0.0515"),
        rule("*", "ratio", 1),
    ]
    assert tokens(rescale(entries, rules)) == [1098982896, 9510492179, 3376166016, 4127779989]
    for budget in (1, 50 * 10**9, 80 * 10**9, 300 * 10**9, 15 * 10**11):
        assert sum(tokens(rescale(entries, rules, budget))) == budget


@pytest.mark.parametrize("option", ["--inputs", "--input"])
def test_mix_datasets_prints_small_weights_that_six_decimals_would_zero(tmp_path, option):
    (tmp_path / "papers.txt").write_text("# comment\n\n1e-7 /p/tiny papers\n1 /p/big papers\n")
    (tmp_path / "dolma.txt").write_text("3 /d/x dolma\n")
    arguments = [option, "0.9", str(tmp_path / "papers.txt"), "0.1", str(tmp_path / "dolma.txt")]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/mix_datasets.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    tiny = Fraction("1e-7") / (1 + Fraction("1e-7")) * Fraction("0.9")
    assert rows[0] == [repr(float(tiny)), "/p/tiny", "papers"]
    assert rows[2] == ["0.1", "/d/x", "dolma"]


def test_mixing_two_column_lists_writes_two_columns(tmp_path):
    (tmp_path / "a.txt").write_text("3 /d/x\n1 /d/y\n")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/mix_datasets.py", "--input", "2", str(tmp_path / "a.txt")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0.75 /d/x\n0.25 /d/y\n"
