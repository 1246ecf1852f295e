"""The blend of a stage is exact, and what cannot be is refused with every reason."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.config.settings.schema import (
    CorpusConfig,
    DataConfig,
    ModelConfig,
    PathsConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_cpt.data.blend.plan import plan_blend
from megatron_cpt.data.blend.sources import validation_prefixes
from megatron_cpt.data.blend.table import align
from megatron_cpt.data.lists.budget import apportion, exact, scale_tokens, spread_samples
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, write_index
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json
from megatron_cpt.launch.submission.validate import check_data

_IDENTITY = {"name": "tok", "kind": "huggingface", "hash": "0123456789", "vocab_size": 100, "eod_id": 0}


def write_shard(prefix, lengths, identity=_IDENTITY):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    np.ones(sum(lengths), dtype=np.uint16).tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype(np.uint16), np.array(lengths))
    write_json(manifest_path(prefix), {"documents": len(lengths), "tokens": sum(lengths), "tokenizer": identity})


def run_config(data_dir, *, mix, corpora, train_tokens=64 * 100, max_epochs=4.0, **data):
    return RunConfig(
        task="t",
        params="p",
        size="s",
        model=ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=100),
        training=TrainingConfig(seq_length=64, micro_batch_size=1, global_batch_size=4, train_tokens=train_tokens),
        data=DataConfig(
            mix=mix,
            corpora={name: CorpusConfig(tokens=tuple(tokens)) for name, tokens in corpora.items()},
            max_epochs=max_epochs,
            **data,
        ),
        paths=PathsConfig(data_dir=str(data_dir)),
    )


@pytest.fixture
def two_corpora(tmp_path):
    write_shard(tmp_path / "D0/a_text_document", [500, 700, 301])
    write_shard(tmp_path / "D0/b_text_document", [1000] * 3)
    write_shard(tmp_path / "D1/c_text_document", [999, 2])
    return {"D0": ["D0"], "D1": ["D1/c_text_document"]}


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(0, 10**15),
    weights=st.lists(st.one_of(st.integers(0, 10**13), st.fractions(0, 1)), min_size=1, max_size=20).filter(any),
)
def test_apportioned_amounts_sum_to_the_total_and_are_within_one_of_their_quota(total, weights):
    amounts = apportion(total, weights)
    assert sum(amounts) == total
    assert all(
        abs(n - total * Fraction(w) / sum(map(Fraction, weights))) < 1 for n, w in zip(amounts, weights, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(1, 10**9), min_size=1, max_size=60), samples=st.integers(0, 10**7), data=st.data())
def test_samples_of_every_entry_and_of_every_run_of_entries_are_within_one_of_their_share(tokens, samples, data):
    counts = spread_samples(tokens, samples)
    assert sum(counts) == samples
    first = data.draw(st.integers(0, len(tokens) - 1))
    last = data.draw(st.integers(first, len(tokens)))
    for start, end in ((first, last), (first, first + 1)):
        assert abs(sum(counts[start:end]) - Fraction(samples * sum(tokens[start:end]), sum(tokens))) < 1


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 10**15), digits=st.integers(1, 99999))
def test_a_ratio_rounds_up_exactly(tokens, digits):
    scaled = scale_tokens(tokens, exact(f"0.{digits:05d}"))
    assert scaled - 1 < Fraction(tokens * digits, 100000) <= scaled


def test_a_ratio_of_one_tenth_is_one_tenth():
    assert exact(0.1) == Fraction(1, 10)
    assert scale_tokens(10**17 + 10, exact(0.1)) == 10**16 + 1


def test_shares_become_tokens_samples_and_epochs_that_sum_exactly(tmp_path, two_corpora):
    plan = plan_blend(run_config(tmp_path, mix={"D0": 0.7, "D1": 0.3}, corpora=two_corpora))
    assert (plan.train_iters, plan.train_samples, plan.train_tokens) == (25, 100, 6400)
    assert sum(entry.tokens for entry in plan.entries) == 6400
    assert [row.taken for row in plan.corpora] == [4480, 1920]
    assert [row.num_samples for row in plan.corpora] == [70, 30]
    assert [row.available for row in plan.corpora] == [4501, 1001]
    assert [entry.tokens for entry in plan.entries] == [1494, 2986, 1920]  # 4480 x 1501/4501 = 1493.998
    assert [entry.corpus for entry in plan.entries] == ["D0", "D0", "D1"]
    assert plan.corpora[1].epochs == Fraction(1920, 1001)
    assert "D1" in plan.table()
    assert "25 iterations, 100 samples, 6,400 tokens" in plan.table()


def test_a_length_that_is_no_whole_batch_is_rounded_up_and_still_sums(tmp_path, two_corpora):
    plan = plan_blend(run_config(tmp_path, mix={"D0": 0.95, "D1": 0.05}, corpora=two_corpora, train_tokens=6145))
    assert plan.train_tokens == 25 * 4 * 64
    assert sum(entry.tokens for entry in plan.entries) == plan.train_tokens
    assert sum(plan.num_samples) == 100


def test_every_reason_for_refusal_is_reported_at_once(tmp_path, two_corpora):
    bin_path(tmp_path / "D0/a_text_document").write_bytes(b"1234")
    manifest_path(tmp_path / "D0/b_text_document").unlink()
    corpora = two_corpora | {"D2": ["nowhere"], "D3": ["nothing/*"]}
    config = run_config(tmp_path, mix={"D0": 0.5, "D1": 0.2, "D2": 0.2, "D3": 0.2, "D9": 0.1}, corpora=corpora)
    with pytest.raises(DataError) as caught:
        plan_blend(config)
    message = str(caught.value)
    for reason in (
        "t/p/s/main: the blend has 6 problems",
        "data.mix sums to 1.2",
        "incomplete shard " + str(tmp_path / "D0/a_text_document"),
        "incomplete shard " + str(tmp_path / "D0/b_text_document"),
        "nowhere: no such shard",
        "nothing/*: matches no",
        "data.mix.D9: no such corpus",
    ):
        assert reason in message


def test_a_corpus_read_too_often_is_refused_with_what_it_can_give(tmp_path, two_corpora):
    config = run_config(tmp_path, mix={"D0": 0.3, "D1": 0.7}, corpora=two_corpora)
    with pytest.raises(
        DataError, match=r"D1 would be read 4.476 times \(4,480 of 1,001 tokens\); data.max_epochs is 4"
    ):
        plan_blend(config)
    raised = dataclasses.replace(config, data=dataclasses.replace(config.data, max_epochs=4.5))
    assert plan_blend(raised).corpora[1].taken == 4480


def test_a_corpus_smaller_than_one_sequence_is_refused(tmp_path, two_corpora):
    write_shard(tmp_path / "tiny_text_document", [64])
    corpora = two_corpora | {"tiny": ["tiny_text_document"]}
    with pytest.raises(DataError, match="tiny has 64 tokens, not one sequence of 64 and the token after it"):
        plan_blend(run_config(tmp_path, mix={"D0": 0.99, "tiny": 0.01}, corpora=corpora))


def test_shards_of_different_tokenizers_are_refused(tmp_path, two_corpora):
    write_shard(tmp_path / "D1/c_text_document", [999, 2], _IDENTITY | {"hash": "fedcba", "name": "other"})
    with pytest.raises(DataError, match=r"other \(hash fedcba"):
        plan_blend(run_config(tmp_path, mix={"D0": 0.7, "D1": 0.3}, corpora=two_corpora))


def test_an_index_cut_off_in_the_middle_is_refused_by_name(tmp_path, two_corpora):
    path = idx_path(tmp_path / "D1/c_text_document")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"incomplete shard .*c_text_document"):
        plan_blend(run_config(tmp_path, mix={"D0": 0.7, "D1": 0.3}, corpora=two_corpora))


def test_shards_too_small_for_a_whole_sample_are_reported_not_dropped(tmp_path, two_corpora):
    for index in range(10):
        write_shard(tmp_path / f"D2/{index}_text_document", [10])
    corpora = two_corpora | {"D2": ["D2"]}
    plan = plan_blend(run_config(tmp_path, mix={"D0": 0.69, "D1": 0.3, "D2": 0.01}, corpora=corpora))
    assert [row.num_samples for row in plan.corpora] == [69, 30, 1]
    assert "9 shards of D2 give not a whole sample" in plan.table()
    assert len(plan.entries) == 13


def test_one_shard_in_two_corpora_is_refused(tmp_path, two_corpora):
    corpora = two_corpora | {"again": ["D0/a_text_document"]}
    with pytest.raises(DataError, match="belongs to the corpora D0 and again"):
        plan_blend(run_config(tmp_path, mix={"D0": 0.5, "again": 0.5}, corpora=corpora))


def test_validation_sets_may_be_folders_and_missing_ones_are_named_before_training(tmp_path, two_corpora):
    write_shard(tmp_path / "held/a_text_document", [100])
    config = run_config(tmp_path, mix={"D0": 1.0}, corpora=two_corpora)
    held_out = {"D0": CorpusConfig(tokens=("D0",), validation=("held", "nothing"))}
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, corpora=held_out),
        evaluation=dataclasses.replace(config.evaluation, eval_interval=5),
    )
    assert validation_prefixes(config, "D0", []) == [str(tmp_path / "held/a_text_document")]
    with pytest.raises(DataError, match="corpus D0: validation: .*nothing: no such shard"):
        check_data(config)
    held_out["D0"] = CorpusConfig(tokens=("D0",), validation=("D0/b_*",))
    with pytest.raises(DataError, match="b_text_document is in the blend and is the validation set of D0"):
        check_data(config)


def test_training_on_a_validation_set_is_refused(tmp_path, two_corpora):
    config = run_config(tmp_path, mix={"D0": 0.7, "D1": 0.3}, corpora=two_corpora)
    held_out = CorpusConfig(tokens=("D1",), validation=("D0/b_text_document",))
    data = dataclasses.replace(config.data, corpora=config.data.corpora | {"D1": held_out})
    with pytest.raises(DataError, match="D0/b_text_document is in the blend and is the validation set of D1"):
        plan_blend(dataclasses.replace(config, data=data))


@pytest.mark.parametrize(
    "text",
    [
        "{first} D0/a_text_document\n{second} D1/c_text_document\n",
        "export X=(\n{first} D0/a_text_document\n{second} D1/c_text_document\n)\n",
    ],
)
def test_a_ready_list_states_the_proportions(tmp_path, two_corpora, text):
    (tmp_path / "list.sh").write_text(text.format(first=4480, second=1920))
    plan = plan_blend(run_config(tmp_path, mix={}, corpora={}, train_data_path="list.sh"))
    assert [entry.tokens for entry in plan.entries] == [4480, 1920]
    assert [entry.prefix for entry in plan.entries] == [
        str(tmp_path / "D0/a_text_document"),
        str(tmp_path / "D1/c_text_document"),
    ]


def test_a_list_without_weights_is_read_in_proportion_to_the_shards(tmp_path, two_corpora):
    (tmp_path / "list.txt").write_text("D0/a_text_document D1/c_text_document\n")
    plan = plan_blend(run_config(tmp_path, mix={}, corpora={}, train_data_path="list.txt"))
    assert [entry.tokens for entry in plan.entries] == [3840, 2560] or sum(e.tokens for e in plan.entries) == 6400
    assert plan.entries[0].tokens == apportion(6400, [1501, 1001])[0]


@pytest.fixture
def three_corpora(tmp_path, two_corpora):
    write_shard(tmp_path / "web/2024/x_text_document", [4000])
    write_shard(tmp_path / "web/2025/y_text_document", [2000])
    return two_corpora | {"web": ["web/2024", "web/2025"]}


def test_rules_give_shares_epochs_and_weights_of_the_stage_exactly(tmp_path, three_corpora):
    rules = {"D1": "epochs 1.5", "D0": "share 0.25", "*/2025/*": "weight 3", "web": "weight 1"}
    plan = plan_blend(run_config(tmp_path, mix={}, corpora=three_corpora, rules=rules))
    tokens = {entry.prefix.split("/")[-1][0]: entry.tokens for entry in plan.entries}
    assert plan.train_tokens == sum(tokens.values()) == 6400
    assert tokens["c"] == 1502  # ceil(1001 x 1.5)
    assert tokens["a"] + tokens["b"] == 1600
    rest = 6400 - 1502 - 1600
    assert abs(tokens["y"] - rest * 3 / 4) < 1 and abs(tokens["x"] - rest / 4) < 1
    assert "D1" in plan.table() and "1.5" in plan.table()


def test_two_pools_divide_the_stage_and_a_cap_moves_tokens_to_others_of_the_pool(tmp_path, three_corpora):
    pools = {"base_pool": "web", "base_ratio": 0.4, "cap_epochs": 1.0}
    plan = plan_blend(run_config(tmp_path, mix={}, corpora=three_corpora, rules={"*": "ratio 1"}, **pools))
    taken = {row.corpus: row.taken for row in plan.corpora}
    assert taken["web"] == 2560 and taken["D0"] + taken["D1"] == 3840
    often = run_config(
        tmp_path, mix={}, corpora=three_corpora, rules={"D1": "weight 9", "*": "weight 1"}, cap_epochs=1.5
    )
    by_corpus = {row.corpus: row for row in plan_blend(often).corpora}
    assert by_corpus["D1"].taken == 1501 and by_corpus["D0"].taken + by_corpus["web"].taken == 6400 - 1501


def test_rules_that_cannot_be_met_are_refused_with_the_reason(tmp_path, three_corpora):
    with pytest.raises(DataError, match="no rule names"):
        plan_blend(run_config(tmp_path, mix={}, corpora=three_corpora, rules={"D0": "share 1"}))
    shares = {"D0": "share 0.5", "*": "share 0.4"}
    with pytest.raises(DataError, match=r"make up 0.9 of the budget"):
        plan_blend(run_config(tmp_path, mix={}, corpora=three_corpora, rules=shares))


def test_a_shard_named_twice_in_a_list_is_read_once_with_both_amounts(tmp_path, two_corpora):
    """Read apart, both entries would draw the same samples: the order of a shard follows from its name."""
    (tmp_path / "list.txt").write_text("1 D0/a_text_document\n2 D1/c_text_document\n1 ./D0/a_text_document\n")
    plan = plan_blend(run_config(tmp_path, mix={}, corpora={}, train_data_path="list.txt"))
    assert [(entry.prefix[-17:], entry.tokens) for entry in plan.entries] == [
        ("D0/a_text_document"[-17:], 3200),
        ("D1/c_text_document"[-17:], 3200),
    ]
    (tmp_path / "list.txt").write_text("1 D0/a_text_document x\n1 D0/a_text_document y\n")
    with pytest.raises(DataError, match="is in the corpora x and y"):
        plan_blend(run_config(tmp_path, mix={}, corpora={}, train_data_path="list.txt"))
    (tmp_path / "D2").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"D2/link{suffix}").symlink_to(tmp_path / f"D1/c_text_document{suffix}")
    with pytest.raises(DataError, match="belongs to the corpora D1 and D2"):
        corpora = two_corpora | {"D2": ["D2"]}
        plan_blend(run_config(tmp_path, mix={"D0": 0.9, "D1": 0.05, "D2": 0.05}, corpora=corpora))


def test_a_list_may_not_name_a_validation_set(tmp_path, two_corpora):
    (tmp_path / "list.txt").write_text("1 D0/a_text_document\n1 D0/b_text_document\n")
    config = run_config(tmp_path, mix={}, corpora={}, train_data_path="list.txt")
    held_out = {"D1": CorpusConfig(tokens=("D1",), validation=("D0/b_text_document",))}
    with pytest.raises(DataError, match="D0/b_text_document is in the blend and is the validation set of D1"):
        plan_blend(dataclasses.replace(config, data=dataclasses.replace(config.data, corpora=held_out)))


def test_a_single_shard_read_too_often_is_refused_though_its_corpus_is_not(tmp_path, two_corpora):
    (tmp_path / "list.txt").write_text("90 D0/a_text_document c\n10 D0/b_text_document c\n")
    message = r"corpus c: 1 shards would be read more than 3 times: .*D0/a_text_document \(3.837\)"
    with pytest.raises(DataError, match=message):
        plan_blend(run_config(tmp_path, mix={}, corpora={}, train_data_path="list.txt", max_epochs=3.0))


def test_small_shards_of_a_list_without_corpora_are_noted_and_many_are_shown_by_folder(tmp_path, two_corpora):
    rows = ["3000 D0/b_text_document", "5 tiny_text_document"]
    write_shard(tmp_path / "tiny_text_document", [5])
    for index in range(45):
        write_shard(tmp_path / f"web/{index}_text_document", [70])
        rows.append(f"70 web/{index}_text_document")
    (tmp_path / "list.txt").write_text("\n".join(rows))
    table = plan_blend(run_config(tmp_path, mix={}, corpora={}, train_data_path="list.txt")).table()
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["D0", ".", "web"]
    assert "1 shards of the list are smaller than one sequence: " in table


def test_columns_of_a_table_stay_below_each_other_where_letters_are_wide():
    assert align([("コーパス", "1"), ("en", "20")]) == ["コーパス   1", "en        20"]


def test_a_share_that_rounds_away_is_said_not_dropped(tmp_path, two_corpora):
    plan = plan_blend(run_config(tmp_path, mix={"D0": 0.999999, "D1": 0.000001}, corpora=two_corpora))
    assert [row.num_samples for row in plan.corpora] == [100, 0]
    assert "note: corpus D1 gives nothing: 0.0064 tokens are asked of it, not one sample" in plan.table()
    rules = {"D1": "share 0.000001", "D0": "share 0.999999"}
    plan = plan_blend(run_config(tmp_path, mix={}, corpora=two_corpora, rules=rules))
    assert [row.corpus for row in plan.corpora] == ["D0", "D1"] and len(plan.entries) == 2
    assert "note: corpus D1 gives nothing" in plan.table()
    left_out = {"D1": "weight 0", "D0": "weight 1"}
    assert "D1" not in plan_blend(run_config(tmp_path, mix={}, corpora=two_corpora, rules=left_out)).table()


def test_what_a_pool_cannot_give_is_said_of_that_pool(tmp_path, three_corpora):
    pools = {"base_pool": "web", "base_ratio": 0.4, "rules": {"web": "share 1", "D0": "share 0.5", "D1": "share 0.4"}}
    with pytest.raises(DataError, match=r"the other pool \(3,840 tokens\): rescale: shares and epochs make up 0.9"):
        plan_blend(run_config(tmp_path, mix={}, corpora=three_corpora, **pools))
