"""Models under Transformer Engine's layer spec: the parameters and checkpoint keys of the local spec, constructed without a GPU."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.torch_dist.weights import is_extra_state
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.verbs.model_arguments import params_model
from tests.train.pretend_engine import import_transformer_engine, install_wheels
from tests.train.tiny import KINDS, tiny_config

ROOT = Path(__file__).resolve().parents[2]
TINY = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 500}
TINY_PARTS = {
    "num_query_groups": 2, "kv_channels": 16, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32, "moe_num_dense_layers": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12, "moe_router_num_groups": 2, "moe_router_group_topk": 1,
}  # fmt: skip
"""Sizes of the parts that a model may have; one that it has not stays away."""


@pytest.mark.parametrize(
    ("name", "is_extra"),
    [
        ("decoder.layers.0.mlp.experts.linear_fc1._extra_state", True),
        ("decoder.layers.0.mlp.experts.linear_fc1._extra_state1", True),
        ("decoder.layers.0.mlp.experts.linear_fc1._extra_state12", True),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight12", False),
        ("decoder.layers.0._extra_state_norm.weight", False),
    ],
)
def test_extra_states_are_told_from_weights(name, is_extra):
    assert is_extra_state(name) is is_extra


@pytest.mark.full
def test_every_model_has_the_parameters_and_keys_of_the_local_spec():
    folder = ROOT / ".venv" / "transformer_engine"
    if problem := install_wheels(folder):
        pytest.skip(f"Transformer Engine's wheels cannot be installed: {problem}")
    program = [sys.executable, "-m", "tests.train.test_transformer_engine", str(folder)]
    answer = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert len(found) == len(cases()) and not {name: keys for name, keys in found.items() if keys["different"]}
    grouped = {name for name, keys in found.items() if keys["numbered_extra_states"]}
    assert grouped == {name for name, model in cases().items() if model.num_moe_experts}
    assert not any(keys["saved_extra_states"] for keys in found.values())


def cases() -> dict[str, ModelConfig]:
    """Return the tests' kinds of models and every params file's, made tiny."""
    models = {kind: tiny_config(kind).model for kind in KINDS}
    models |= {
        f"{kind} without q_lora_rank": dataclasses.replace(models[kind], q_lora_rank=None)
        for kind in ("mla", "deepseek")
    }
    for path in sorted((ROOT / "params").glob("*.yaml")):
        model = params_model(str(path))
        parts = {name: value for name, value in TINY_PARTS.items() if getattr(model, name)}
        models[path.stem] = dataclasses.replace(model, **TINY, **parts)
    return models


def compare_all(folder: Path) -> None:
    """Print, per model, how the checkpoint keys of both specs differ. A program of its own: it changes the process."""
    import_transformer_engine(folder)
    from megatron_cpt.train.backend.parallel import initialize_parallel

    initialize_parallel(tiny_config("dense"))
    found = {}
    for name, model in cases().items():
        local, _ = keys_of(model, with_engine=False)
        engine, extra = keys_of(model, with_engine=True)
        found[name] = {
            "different": sorted({str(item) for item in local.items() ^ engine.items()})[:8],
            "numbered_extra_states": any(not key.endswith("_extra_state") for key in extra),
            "saved_extra_states": [key for key in engine if "_extra_state" in key],
        }
    sys.stdout.write(json.dumps(found) + "\n")


def keys_of(model: ModelConfig, *, with_engine: bool) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the shape of every key that a checkpoint of a model has, and the names of the extra states left out of it."""
    from unittest import mock

    import torch

    from megatron_cpt.train.model import build
    from megatron_cpt.train.state import checkpointing

    config = dataclasses.replace(tiny_config("dense"), model=model)
    with mock.patch.object(build, "has_transformer_engine", lambda: with_engine):
        settings = build.transformer_config(config)
        # its constructors refuse without CUDA
        available = mock.patch.object(torch.cuda, "is_available", lambda: True) if with_engine else mock.MagicMock()
        with available:
            (chunk,) = build.build_model_chunks(config, settings)
    state = checkpointing._sharded_model([chunk])["model"]
    # on one rank, what a factory (gate and up rows) has in hand is the whole tensor
    shapes = {part.key: tuple(getattr(part, "global_shape", part.data.shape)) for part in state.values()}
    extra = [
        name for name, _ in chunk.sharded_state_dict(metadata=checkpointing._metadata()).items() if is_extra_state(name)
    ]
    return shapes, extra


if __name__ == "__main__":
    compare_all(Path(sys.argv[1]))
