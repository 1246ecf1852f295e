"""`training.compile`: compiled layers train as plain ones do. On CPU their graphs are run without code made from them."""

import dataclasses

import pytest

from tests.tiers import full_except
from tests.tolerances import assert_fp32_rounding
from tests.train.tiny import batches, tiny_config


def compiled_steps(config, is_compiled):
    """Return loss and gradient norm of two steps, and how many graphs were made and where they broke."""
    import torch

    from megatron_cpt.train.backend import cpu
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model import build as building
    from megatron_cpt.train.stage.step import train_step

    cpu._disable_compilation = lambda: None
    compile_layers = building.compile_layers
    building.compile_layers = lambda model: compile_layers(model, backend="aot_eager")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, compile=is_compiled))
    initialize_parallel(config)
    model, optimizer = building.build_training_model(config)
    steps = [train_step(model, optimizer, batches(config, step), config, 1e-3) for step in range(2)]
    finish_parallel()
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    return [(step.loss, step.grad_norm) for step in steps], graphs, breaks


@pytest.mark.parametrize(
    ("kind", "layout"),
    full_except(
        [
            ("qwen", {}),
            ("dense", {"tensor_model_parallel_size": 2}),
            ("dense", {"recompute_granularity": "full"}),
            ("moe", {}),
        ],
        ("qwen", {}),
    ),
    ids=str,
)
def test_compiled_layers_train_as_plain_ones(ranks, kind, layout):
    world_size, config = layout.get("tensor_model_parallel_size", 1), tiny_config(kind, **layout)
    plain = ranks.run(compiled_steps, world_size, config, False)
    compiled = ranks.run(compiled_steps, world_size, config, True)
    for (steps, graphs, breaks), (expected, no_graphs, _) in zip(compiled, plain, strict=True):
        assert_fp32_rounding(steps, expected)
        assert graphs > no_graphs == 0
        if kind == "qwen":
            assert (graphs, breaks) == (1, 0), "all layers share one graph, and nothing cuts it"


def test_a_cpu_runs_layers_as_they_are_and_says_so(ranks):
    assert ranks.run(said_on_a_cpu, 1, tiny_config()) == [True]


def said_on_a_cpu(config):
    """Return whether layers stay as they are, with a warning."""
    import logging

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model import build as building

    said = []
    building.logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, compile=True))
    initialize_parallel(config)
    (model,) = building.build_model_chunks(config)
    plain = all("forward" not in vars(layer) for layer in model.decoder.layers)
    finish_parallel()
    return plain and any("training.compile" in text for text in said)
