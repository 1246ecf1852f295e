"""Deterministic mode: two trainings of the same stage give the same bits on CPU."""

import pytest

from tests.train.tiny import batches, tiny_config


def weights_hash(kind: str, layout: dict) -> str:
    """Train four steps from the seed and return a hash of this rank's weights and optimizer state."""
    import dataclasses
    import hashlib

    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step

    torch.use_deterministic_algorithms(True)
    config = tiny_config(kind, model={"hidden_dropout": 0.1}, **layout)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, deterministic=True))
    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    losses = [train_step(model, optimizer, batches(config, step), config, 1e-3).loss for step in range(4)]
    digest = hashlib.blake2b(repr(losses).encode())
    for chunk in model:
        for name, parameter in sorted(chunk.named_parameters()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    finish_parallel()
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("kind", "world_size", "layout"),
    [
        ("dense", 1, {}),
        ("dense", 2, {"tensor_model_parallel_size": 2}),
        ("moe", 1, {}),
        ("moe", 2, {"expert_model_parallel_size": 2}),
        ("mla", 2, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_two_trainings_are_bit_identical(ranks, kind, world_size, layout):
    first, second = (ranks.run(weights_hash, world_size, kind, layout) for _ in range(2))
    assert first == second
