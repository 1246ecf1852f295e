"""Validation sets that are no multiple of a batch, or smaller than one: every sample counts once under every layout."""

from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.files import write_json
from tests.tiers import full_except
from tests.tolerances import assert_fp32_rounding, assert_fp64_rounding
from tests.train.test_masked_training import write_plain
from tests.train.tiny import EOD, SEQ, run_steps, tiny_config


def measured(config, checkpoint: str, shard: str, eval_iters: int) -> tuple[int, dict[str, float], float]:
    """Return the samples of a validation set, its losses, and the loss of as many of its samples by hand."""
    import dataclasses

    import torch
    from megatron.core import parallel_state

    from megatron_cpt.config.settings.schema import EvaluationConfig
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.samples.batches import DatasetTokenizer, build_batch, build_validation_dataset
    from megatron_cpt.train.stage.validation import ValidationSet, validation_loss
    from megatron_cpt.train.state.checkpointing import load_checkpoint

    config = dataclasses.replace(config, evaluation=EvaluationConfig(eval_interval=1, eval_iters=eval_iters))
    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    load_checkpoint(Path(checkpoint), model, optimizer)
    folder = Path(shard).parent / "cache"
    dataset = build_validation_dataset(config, [shard], DatasetTokenizer(EOD, 500, None), folder)
    losses = validation_loss(model, ValidationSet("D0", dataset, 2.5), config, EOD)
    by_hand = float("nan")
    if torch.distributed.get_world_size() == 1:
        found = []
        for index in range(min(len(dataset), eval_iters * config.training.global_batch_size)):
            sample = dataset[index]
            batch = build_batch(torch.cat([sample["tokens"], sample["labels"][-1:]])[None], config, EOD)
            with torch.no_grad():
                logits = model[0](batch.tokens, batch.position_ids, batch.attention_mask)[..., :500]
            found += torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="none").tolist()
        by_hand = float(np.mean(found))
    assert model[0].training
    assert parallel_state.model_parallel_is_initialized()
    finish_parallel()
    return len(dataset), losses, by_hand


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    ranks.run(run_steps, 1, tiny_config(), 0, 2, None, str(folder))
    return str(folder / "iter_0000002")


def held_out(folder: Path, samples: int) -> str:
    """Write a shard that gives so many samples and part of another."""
    rng = np.random.default_rng(samples)
    lengths = [40] * ((samples * SEQ + 30) // 40 + 1)
    write_plain(folder / "held_out", [np.append(rng.integers(EOD + 1, 400, n - 1), EOD) for n in lengths])
    tokens = sum(lengths)
    write_json(
        folder / "held_out.json", {"documents": len(lengths), "tokens": tokens, "tokenizer": {}, "bytes": tokens}
    )
    return str(folder / "held_out")


@pytest.mark.parametrize(("samples", "eval_iters"), full_except([(3, 10), (11, 10), (11, 1)], (3, 10)))
def test_every_sample_counts_once_whatever_the_batch(ranks, tmp_path, checkpoint, samples, eval_iters):
    shard = held_out(tmp_path, samples)
    ((count, expected, by_hand),) = ranks.run(measured, 1, tiny_config(), checkpoint, shard, eval_iters)
    assert samples <= count <= samples + 1
    assert_fp32_rounding(expected["loss"], by_hand)
    assert_fp64_rounding(expected["bits_per_byte"], expected["loss"] / np.log(2) / 2.5)
    layouts = [{}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}]
    for layout in layouts if samples == 3 else layouts[:1]:
        for _, losses, _ in ranks.run(measured, 2, tiny_config(**layout), checkpoint, shard, eval_iters):
            assert_fp32_rounding(losses["loss"], expected["loss"])
