"""`data.prompt_loss_weight`: prompts count with their weight, in loss and gradient, under every layout and after a resume."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cpt.data.shards.masked import LEARNED, PIECE, PROMPT, write_masked_shard
from megatron_cpt.train.samples.shard_samples import loss_of_bits
from tests.tiers import full_except
from tests.tolerances import STEP_ROUNDINGS, assert_fp32_rounding
from tests.train.test_masked import TOKENIZER
from tests.train.tiny import BATCH, EOD, SEQ, manifest_of, run_steps, tiny_config

WEIGHT = 0.3


def weighted(config, weight=WEIGHT):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, prompt_loss_weight=weight))


def dataset(config, folder: str):
    from megatron_cpt.data.blend.stage_order import StageOrder
    from megatron_cpt.data.lists.data_list import DataEntry
    from megatron_cpt.train.samples.batches import DatasetTokenizer, build_train_dataset

    entries = (DataEntry(prefix=f"{folder}/chat", tokens=32 * SEQ, corpus="chat"),)
    order = StageOrder(entries=entries, num_samples=32, count=32, seq_length=SEQ, seed=config.training.seed)
    return build_train_dataset(config, order, DatasetTokenizer(EOD, 500, None), Path(folder) / "cache")


def weighted_steps(config, load: str, save: str | None, folder: str, first: int, last: int):
    """Return loss and gradient norm of steps [first, last) of chats from a checkpoint."""
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.samples.batches import microbatches
    from megatron_cpt.train.stage.step import train_step
    from megatron_cpt.train.state.checkpointing import load_checkpoint, save_checkpoint

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    load_checkpoint(Path(load), model, optimizer)
    samples, results = dataset(config, folder), []
    for step in range(first, last):
        results.append(
            train_step(model, optimizer, microbatches(samples, step * BATCH, BATCH, config, EOD), config, 1e-3)
        )
    if save:
        save_checkpoint(Path(save), last, model, optimizer, manifest_of(config, last))
    finish_parallel()
    return [(result.loss, result.grad_norm) for result in results]


def by_hand(config, load: str, folder: str):
    """Return the weighted mean of the first batch's losses, and the norm of its gradient, from the logits."""
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_model_chunks
    from megatron_cpt.train.samples.batches import microbatches
    from megatron_cpt.train.state.checkpointing import load_checkpoint

    initialize_parallel(config)
    (model,) = build_model_chunks(config)
    load_checkpoint(Path(load), [model], None)
    total, weights = torch.zeros(()), 0.0
    for batch in microbatches(dataset(config, folder), 0, BATCH, config, EOD):
        logits = model(batch.tokens, batch.position_ids, batch.attention_mask)[..., :500]
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), batch.labels, reduction="none")
        total = total + (losses * batch.loss_mask).sum()
        weights += float(batch.loss_mask.double().sum())
    (total / weights).backward()
    norm = torch.stack([one.grad.double().norm() for one in model.parameters() if one.grad is not None]).norm()
    finish_parallel()
    return float(total) / weights, float(norm)


@pytest.fixture(scope="module")
def chats(ranks, tmp_path_factory):
    """A checkpoint of one rank and the folder of a shard of chats: prompts, answers, and tokens that never count."""
    folder = tmp_path_factory.mktemp("weights")
    ranks.run(run_steps, 1, tiny_config(), 0, 1, None, str(folder))
    rng = np.random.default_rng(3)
    documents = []
    for _ in range(80):
        ids = np.append(rng.integers(EOD + 1, 400, 40), EOD)
        mask = np.repeat([PROMPT, LEARNED, 0], [15, 20, 6]).astype(np.uint8)
        mask[0] |= PIECE
        documents.append((ids, mask))
    write_masked_shard(folder / "chat", documents, np.dtype(np.int32), TOKENIZER)
    return str(folder / "iter_0000001"), str(folder)


def test_a_label_weighs_what_its_bits_say():
    bits = np.array([0, LEARNED, PROMPT, PIECE, PIECE | PROMPT, PIECE | LEARNED])
    assert loss_of_bits(bits, 0.25).tolist() == [0.0, 1.0, 0.25, 0.0, 0.0, 0.0]
    assert loss_of_bits(bits).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_loss_and_gradient_are_the_weighted_means(ranks, chats):
    found = {}
    for weight in (0.0, WEIGHT, 1.0):
        config = weighted(tiny_config(), weight)
        ((expected, norm),) = ranks.run(by_hand, 1, config, *chats)
        (steps,) = ranks.run(weighted_steps, 1, config, chats[0], None, chats[1], 0, 1)
        assert_fp32_rounding(steps[0], (expected, norm), roundings=2 * STEP_ROUNDINGS)  # two programs, a step each
        found[weight] = steps[0]
    assert len({round(loss, 5) for loss, _ in found.values()}) == 3


LAYOUTS = ("data", "context", "pipeline", "tensor")


@pytest.mark.slow
@pytest.mark.parametrize("layout", full_except(LAYOUTS, "context"))
def test_weights_are_the_same_under_every_layout(ranks, chats, layout):
    (expected,) = ranks.run(weighted_steps, 1, weighted(tiny_config()), chats[0], None, chats[1], 0, 2)
    name = f"{layout}_{'model_' if layout in ('pipeline', 'tensor') else ''}parallel_size"
    config = weighted(tiny_config(**({} if layout == "data" else {name: 2})))
    for result in ranks.run(weighted_steps, 2, config, chats[0], None, chats[1], 0, 2):
        assert_fp32_rounding(result, expected)


@pytest.mark.slow
def test_a_run_with_weights_resumes_and_reshards(ranks, chats, tmp_path):
    config = weighted(tiny_config())
    (whole,) = ranks.run(weighted_steps, 1, config, chats[0], None, chats[1], 0, 4)
    (half,) = ranks.run(weighted_steps, 1, config, chats[0], str(tmp_path), chats[1], 0, 2)
    assert half == whole[:2]
    saved = str(tmp_path / "iter_0000002")
    (rest,) = ranks.run(weighted_steps, 1, config, saved, None, chats[1], 2, 4)
    assert rest == whole[2:]
    other = weighted(tiny_config(tensor_model_parallel_size=2))
    for result in ranks.run(weighted_steps, 2, other, saved, None, chats[1], 2, 4):
        assert_fp32_rounding(result, whole[2:], roundings=3 * STEP_ROUNDINGS)  # three steps on other layouts


def test_a_share_outside_of_0_and_1_is_refused():
    from megatron_cpt.config.checks.samples import sample_problems

    for weight, found in ((-0.1, True), (1.5, True), (0.0, False), (0.4, False), (1.0, False)):
        keys = [problem.keys for problem in sample_problems(weighted(tiny_config(), weight))]
        assert (("data.prompt_loss_weight",) in keys) == found
