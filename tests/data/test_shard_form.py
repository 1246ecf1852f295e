"""How a shard is to be read, and that a plan refuses packs of another length."""

import dataclasses

import numpy as np
import pytest

from megatron_cpt.config.settings.schema import CorpusConfig, EvaluationConfig
from megatron_cpt.data.blend.plan import plan_blend
from megatron_cpt.data.shards.discovery import find_shards
from megatron_cpt.data.shards.form import ShardForm, read_shard_form
from megatron_cpt.data.shards.indexed import manifest_path
from megatron_cpt.data.shards.masked import PIECE, write_masked_shard
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json, write_json
from tests.data.test_blend import _IDENTITY, run_config, write_shard


def write_packs(prefix, seq_length, count=40):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    packs = [(np.ones(seq_length), np.array([PIECE] + [1] * (seq_length - 1))) for _ in range(count)]
    write_masked_shard(prefix, packs, np.dtype(np.uint16), _IDENTITY, packed_seq_length=seq_length)


def test_plain_masked_and_packed_shards_are_told_apart(tmp_path):
    write_shard(tmp_path / "plain", [10])
    write_masked_shard(tmp_path / "masked", [(np.ones(3), np.ones(3))], np.dtype(np.uint16), _IDENTITY)
    write_packs(tmp_path / "packed", 64)
    assert read_shard_form(tmp_path / "plain") == ShardForm()
    assert read_shard_form(tmp_path / "masked") == ShardForm(is_masked=True, marks_prompts=True)
    assert read_shard_form(tmp_path / "packed") == ShardForm(is_masked=True, marks_prompts=True, packed_seq_length=64)


def test_packs_without_a_mask_are_refused(tmp_path):
    write_shard(tmp_path / "s", [64])
    path = manifest_path(tmp_path / "s")
    write_json(path, read_json(path, DataError) | {"packed": {"seq_length": 64}})
    with pytest.raises(DataError, match="is packed and has no mask"):
        read_shard_form(tmp_path / "s")


def test_a_mask_is_no_shard_of_its_own(tmp_path):
    write_packs(tmp_path / "chat" / "s", 64)
    for pattern in ("chat", "chat/*", "chat/s"):
        assert find_shards([pattern], tmp_path) == ([str(tmp_path / "chat" / "s")], [])


def test_a_plan_takes_whole_packs_and_refuses_those_of_another_length(tmp_path):
    write_packs(tmp_path / "chat" / "s", 64)
    plan = plan_blend(run_config(tmp_path, mix={"chat": 1.0}, corpora={"chat": ["chat"]}))
    assert plan.num_samples == [100] and plan.corpora[0].epochs == 2.5
    write_packs(tmp_path / "other" / "s", 32)
    with pytest.raises(DataError, match=r"other/s is packed for sequences of 32 tokens; training.seq_length is 64"):
        plan_blend(run_config(tmp_path, mix={"other": 1.0}, corpora={"other": ["other"]}, train_tokens=64 * 8))


def test_one_pack_is_enough(tmp_path):
    write_packs(tmp_path / "one" / "s", 64, count=1)
    config = run_config(tmp_path, mix={"one": 1.0}, corpora={"one": ["one"]}, train_tokens=64 * 4)
    assert plan_blend(config).num_samples == [4]


def test_held_out_packs_of_another_length_are_refused_where_they_are_measured(tmp_path):
    write_packs(tmp_path / "chat" / "s", 64)
    write_packs(tmp_path / "held_out", 32)
    config = run_config(tmp_path, mix={"chat": 1.0}, corpora={"chat": ["chat"]})
    corpora = {"chat": CorpusConfig(tokens=("chat",), validation=("held_out",))}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, corpora=corpora))
    assert plan_blend(config)
    with pytest.raises(DataError, match="held_out is packed for sequences of 32"):
        plan_blend(dataclasses.replace(config, evaluation=EvaluationConfig(eval_interval=5)))


def test_prompts_are_weighed_only_where_a_mask_marks_them(tmp_path):
    """A shard from before prompts were marked trains as it did, is packed and merged, and is refused a weight."""
    from megatron_cpt.data.joining.merge import merge_shards
    from megatron_cpt.data.joining.packing import PackOptions, pack_shard
    from megatron_cpt.data.shards.form import prompt_problem

    prefixes = [tmp_path / name for name in ("new", "old", "plain")]
    write(prefixes[0], tmp_path)
    write(prefixes[1], tmp_path, is_old=True)
    assert prompt_problem(read_shard_form(prefixes[0])) is None
    assert prompt_problem(read_shard_form(prefixes[2])) is None  # no shard, no mask: nothing to weigh
    assert "does not say which tokens are a prompt's" in prompt_problem(read_shard_form(prefixes[1]))
    for prefix in prefixes[:2]:
        packed = prefix.with_name(prefix.name + "-packed")
        manifest, _ = pack_shard(prefix, packed, PackOptions(seq_length=8))
        assert ("prompt" in manifest["mask"]) == (prefix.name == "new")
    merged = merge_shards(prefixes[:2], tmp_path / "both")
    assert "prompt" not in merged["mask"] and merged["mask"]["learned"] == 4


def write(prefix, tmp_path, *, is_old=False):
    import json

    import numpy as np

    from megatron_cpt.data.shards.indexed import manifest_path
    from megatron_cpt.data.shards.masked import LEARNED, PIECE, PROMPT, write_masked_shard

    tokenizer = {"name": "tiny", "kind": "test", "hash": "0", "vocab_size": 500, "eod_id": 7}
    prompt = 0 if is_old else PROMPT
    mask = np.array([PIECE | prompt, prompt, LEARNED, LEARNED, 0])
    manifest = write_masked_shard(prefix, [(np.array([9, 10, 11, 12, 7]), mask)], np.dtype(np.int32), tokenizer)
    manifest["sources"] = [{"path": prefix.name, "size": 1, "mtime_ns": 1}]
    if is_old:
        del manifest["mask"]["prompt"]
    manifest_path(prefix).write_text(json.dumps(manifest))
