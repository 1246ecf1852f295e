"""Optimizer state of other programs' checkpoints trains on: the ranks hold the source's moments, bit by bit."""

import dataclasses
import re
import shutil

import pytest
import torch

from megatron_cpt.checkpoint.foreign.convert import foreign_to_mcore
from megatron_cpt.checkpoint.foreign.opening import is_loadable
from megatron_cpt.checkpoint.inspection import adopt_checkpoint
from megatron_cpt.checkpoint.mapping.units import family_of, units
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.checkpoint.torch_dist.dcp_writer import Slice, write_dcp
from megatron_cpt.config.settings.schema import InitConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.run.directory import RunDir
from megatron_cpt.train.state.start_weights import initial_checkpoint
from tests.checkpoint.test_foreign import DEEPSPEED, deepspeed_name
from tests.checkpoint.test_sources import stacked
from tests.tiers import full_except
from tests.train.foreign import load_and_save, train_and_write_torch_format
from tests.train.tiny import run_steps, tiny_config

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
STATE = re.compile(r"optimizer\.state\.(\w+?)\.(.+)")


def tensors(directory):
    """Return every tensor of a `torch_dist` folder, the embedding without padding."""
    reader = DcpReader(directory)
    found = {key: reader.read(key) for key in reader.tensor_keys()}
    return {key: t[:500] if "word_embeddings" in key or "output_layer" in key else t for key, t in found.items()}


def assert_equal(left, right):
    """Compare two checkpoints' tensors bit by bit."""
    left, right = tensors(left), tensors(right)
    assert left.keys() == right.keys()
    different = [key for key in left if left[key].dtype != right[key].dtype or not torch.equal(left[key], right[key])]
    assert not different


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """Return a checkpoint of one rank after two steps, and its next two steps."""
    root = tmp_path_factory.mktemp("trained")
    ranks.run(run_steps, 1, tiny_config(), 0, 2, None, str(root))
    checkpoint = root / "iter_0000002"
    (steps,) = ranks.run(run_steps, 1, tiny_config(), 2, 4, str(checkpoint), None)
    return checkpoint, steps


@pytest.mark.parametrize(
    ("kind", "precision", "world_size", "layout"),
    full_except(
        [
            ("dense", "bf16", 4, {TP: 2, PP: 2}),
            ("tied", "fp32", 2, {PP: 2}),
            ("dense", "fp32", 2, {PP: 2, VPP: 2}),
            ("qwen", "bf16", 2, {}),
            ("moe", "bf16", 1, {}),
            ("mla", "bf16", 2, {TP: 2}),
        ],
        ("dense", "bf16", 4, {TP: 2, PP: 2}),
        ("moe", "bf16", 1, {}),
    ),
)
def test_the_distributed_optimizers_buffers_are_taken_apart_by_name(
    ranks, tmp_path, kind, precision, world_size, layout
):
    config = tiny_config(kind, precision, **layout)
    ranks.run(train_and_write_torch_format, world_size, config, str(tmp_path / "old"), str(tmp_path / "ours"))
    converted = foreign_to_mcore(tmp_path / "old", tmp_path / "new", config.model, optimizer="needed", verify=True)
    assert_equal(converted, tmp_path / "ours" / "iter_0000002")
    assert mcore.read_manifest(converted)["optimizer_step"] == 2


@pytest.mark.parametrize("precision", full_except(["bf16", "fp32"], "bf16"))
def test_the_plain_optimizers_state_is_taken_apart_by_name_and_loads(ranks, tmp_path, precision):
    plain = tiny_config("qwen", precision, **{TP: 2}, use_distributed_optimizer=False)
    ranks.run(train_and_write_torch_format, 2, plain, str(tmp_path / "old"), "")
    converted = foreign_to_mcore(tmp_path / "old", tmp_path / "new", plain.model, optimizer="needed")
    (step,) = ranks.run(load_and_save, 1, tiny_config("qwen", precision), str(converted), str(tmp_path / "again"))
    assert step == 2
    assert_equal(converted, tmp_path / "again" / "iter_0000001")
    moments = tensors(converted)
    state = torch.load(tmp_path / "old" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    weight = state["model"]["decoder.layers.1.self_attention.linear_proj.weight"]
    key = "optimizer.state.exp_avg.decoder.layers.1.self_attention.linear_proj.weight"
    inner = state["optimizer"]["optimizer"] if precision == "bf16" else state["optimizer"]
    assert any(
        values["exp_avg"].shape == weight.shape and torch.equal(values["exp_avg"], moments[key][:, : weight.shape[1]])
        for values in inner["state"].values()
    )


def test_state_that_cannot_be_told_apart_is_refused_and_weights_alone_are_taken(ranks, tmp_path, caplog):
    config = tiny_config("dense", "bf16")
    ranks.run(train_and_write_torch_format, 1, config, str(tmp_path / "old"), str(tmp_path / "ours"))
    path = tmp_path / "old" / "mp_rank_00" / "distrib_optim.pt"
    state = torch.load(path, weights_only=False)
    next(iter(state[0].values()))["param"] += 1
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="output_layer.weight is not where its order says"):
        foreign_to_mcore(tmp_path / "old", tmp_path / "new", config.model, optimizer="needed")
    converted = foreign_to_mcore(tmp_path / "old", tmp_path / "new", config.model)
    assert "weights only" in caplog.text and mcore.read_manifest(converted)["content"] == "weights"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no distrib_optim.pt next to it"):
        foreign_to_mcore(tmp_path / "old", tmp_path / "other", config.model, optimizer="needed")


def write_universal(checkpoint, target, names, step):
    """Write a checkpoint's parameters and moments as DeepSpeed's universal form, named in one of four ways."""
    held = tensors(checkpoint)
    model = tiny_config().model
    for unit in units(model, family_of("LlamaForCausalLM")):
        for kind, file in (("param", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            tensor = held[f"optimizer.state.{kind}.{unit.key}"]
            if names == "huggingface":
                parts = dict(zip(unit.hf, unit.to_hf(tensor, model), strict=True))
            elif names == "megatron-core":
                parts = {unit.key: tensor}
            else:
                name = DEEPSPEED.get(unit.key) or deepspeed_name(unit.key)
                parts = {pipeline_name(name) if names == "pipeline" else name: tensor}
            for name, part in parts.items():
                folder = target / "zero" / name
                folder.mkdir(parents=True, exist_ok=True)
                torch.save({"param": part.clone(), "cat_dim": 0}, folder / f"{file}.pt")
                if names != "megatron-core":
                    torch.save(step, folder / "step.pt")
    if names == "megatron-core":
        torch.save({"param_groups": [{"lr": 0.1, "step": step}]}, target / "zero" / "optimizer_state.pt")


def pipeline_name(name):
    """Return the name that Megatron-DeepSpeed's pipeline module gives a parameter of a model of four layers."""
    match = re.fullmatch(r"language_model\.encoder\.layers\.(\d+)\.(.+)", name)
    if match:
        return f"{int(match[1]) + 3}.{match[2]}"
    return {
        "language_model.embedding.word_embeddings.weight": "1.word_embeddings.weight",
        "language_model.encoder.final_layernorm.weight": "8.weight",
        "language_model.output_layer.weight": "9.lm_head.weight",
    }[name]


@pytest.mark.parametrize("names", ["megatron-deepspeed", "pipeline", "megatron-core", "huggingface"])
def test_a_deepspeed_universal_checkpoint_trains_on_with_its_moments(ranks, trained, tmp_path, names):
    checkpoint, expected = trained
    write_universal(checkpoint, tmp_path / "universal", names, step=2)
    config = tiny_config()
    converted = foreign_to_mcore(tmp_path / "universal", tmp_path / "new", config.model, optimizer="needed")
    assert_equal(converted, checkpoint)
    if names == "pipeline":
        layout = tiny_config(**{TP: 2})
        results = ranks.run(load_and_save, 2, layout, str(converted), str(tmp_path / "again"))
        assert results == [2, 2]
        assert_equal(converted, tmp_path / "again" / "iter_0000001")
        (steps,) = ranks.run(run_steps, 1, config, 2, 4, str(converted), None)
        assert steps == expected


def test_a_universal_checkpoint_without_moments_or_with_unequal_steps_is_said(trained, tmp_path):
    checkpoint, _ = trained
    model = tiny_config().model
    write_universal(checkpoint, tmp_path / "universal", "huggingface", step=2)
    torch.save(3, tmp_path / "universal" / "zero" / "lm_head.weight" / "step.pt")
    with pytest.raises(CheckpointError, match="parameters after 2 to 3 updates"):
        foreign_to_mcore(tmp_path / "universal", tmp_path / "new", model, optimizer="needed")
    for path in (tmp_path / "universal").rglob("exp_avg.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no zero/<parameter>/exp_avg.pt"):
        foreign_to_mcore(tmp_path / "universal", tmp_path / "new", model, optimizer="needed")


def rewritten(checkpoint, target, change):
    """Write a checkpoint as Megatron-LM would: `change` applied to the weights and to each kind of moment; no manifest."""
    groups = {}
    for key, value in tensors(checkpoint).items():
        match = STATE.fullmatch(key)
        groups.setdefault(match[1] if match else None, {})[match[2] if match else key] = value
    named = {
        key if kind is None else f"optimizer.state.{kind}.{key}": value
        for kind, group in groups.items()
        for key, value in change(kind, group).items()
    }
    target.mkdir(parents=True)
    slices = [Slice(k, tuple(t.shape), t.dtype, (0,) * t.ndim, tuple(t.shape), lambda t=t: t) for k, t in named.items()]
    write_dcp(target, slices)
    for name in ("metadata.json", "common.pt"):
        shutil.copy(checkpoint / name, target)
    return target


def local_names(kind, group):
    """Name the norms as Megatron's local specification without its key map, e.g. up to 0.6, does."""
    return {
        key.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight").replace(
            "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
        ): value
        for key, value in group.items()
    }


def model_space(kind, group):
    """Lay moments out as `fully_sharded_model_space` at TP2 does: stacked layers, flat parts; main ones as fp32_param."""
    group = stacked(group)
    if kind is None:
        return group
    flat = {}
    for key, value in group.items():
        layers = key.startswith("decoder.layers.")
        shape = value.shape[1:] if layers else value.shape
        if len(shape) == 1 and not layers:
            flat[key] = value
            continue
        dim = 1 if "linear_proj" in key or "linear_fc2" in key else 0
        count = 1 if len(shape) == 1 else 4 if "linear_fc1" in key else 2
        parts = value.chunk(count, dim=dim + layers)
        grid = [count if axis == dim else 1 for axis in range(len(shape))]
        rows = [part.reshape(value.shape[0], -1) if layers else part.reshape(1, -1) for part in parts]
        whole = torch.stack(rows, dim=1)  # [layers or 1, parts, elements]
        flat[key] = whole.reshape(*([value.shape[0]] if layers else []), *grid, -1)
    return flat


@pytest.mark.parametrize(
    "change",
    [
        lambda kind, group: stacked(group),
        local_names,
        lambda kind, group: stacked(local_names(kind, group)),
        model_space,
    ],
    ids=["stacked", "local", "stacked-local", "model-space"],
)
def test_megatron_lms_own_checkpoints_start_a_run_directly(trained, tmp_path, change):
    checkpoint, _ = trained
    foreign = rewritten(checkpoint, tmp_path / "theirs" / "iter_0000007", change)
    mcore.write_tracker(tmp_path / "theirs", 7)
    config = tiny_config()
    config = dataclasses.replace(config, init=InitConfig(from_path=str(tmp_path / "theirs"), load="full"))
    assert not is_loadable(foreign, config.model)
    start = initial_checkpoint(config, RunDir(tmp_path / "run"))
    assert start == tmp_path / "run" / "init" / "release"
    assert_equal(start, checkpoint)
    assert initial_checkpoint(config, RunDir(tmp_path / "run")) == start


def test_an_adopted_checkpoint_of_stacked_layers_is_converted_and_one_with_our_keys_is_not(trained, tmp_path):
    checkpoint, _ = trained
    model = tiny_config().model
    for name, change in (("stacked", lambda kind, group: stacked(group)), ("ours", lambda kind, group: group)):
        foreign = rewritten(checkpoint, tmp_path / name / "iter_0000007", change)
        adopt_checkpoint(foreign, model)
        config = dataclasses.replace(tiny_config(), init=InitConfig(from_path=str(foreign), load="full"))
        start = initial_checkpoint(config, RunDir(tmp_path / f"run-{name}"))
        assert (start == foreign) == (name == "ours")


def test_optimizer_state_of_one_data_parallel_layout_is_refused_by_name(trained, tmp_path):
    checkpoint, _ = trained
    foreign = rewritten(checkpoint, tmp_path / "iter_0000007", lambda kind, group: group if kind is None else {})
    common = torch.load(foreign / "common.pt", weights_only=False)
    common["content_metadata"]["distrib_optim_sharding_type"] = "dp_reshardable"
    torch.save(common, foreign / "common.pt")
    with pytest.raises(CheckpointError, match="dp_reshardable: buffers of one data-parallel layout"):
        foreign_to_mcore(foreign, tmp_path / "new", tiny_config().model, optimizer="needed")


def test_an_unfinished_save_of_ours_is_not_taken_for_a_foreign_checkpoint(trained, tmp_path):
    checkpoint, _ = trained
    for iteration in (1, 2):
        shutil.copytree(checkpoint, tmp_path / f"iter_000000{iteration}")
    (tmp_path / "iter_0000002" / mcore.MANIFEST).unlink()
    mcore.write_tracker(tmp_path, 2)
    config = dataclasses.replace(tiny_config(), init=InitConfig(from_path=str(tmp_path), load="full"))
    assert initial_checkpoint(config, RunDir(tmp_path / "run")) == tmp_path / "iter_0000001"
