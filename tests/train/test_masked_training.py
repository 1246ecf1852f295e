"""Training on masked shards: the loss of learned tokens only, pieces apart, NEFTune's noise, the same under any layout."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cpt.data.shards.masked import PIECE
from megatron_cpt.train.model.neftune import embedding_noise
from megatron_cpt.train.samples.shard_samples import loss_of_bits
from tests.tolerances import assert_estimate, assert_fp32_rounding
from tests.train.test_attention import with_bounds
from tests.train.test_masked import write_conversations, write_packs
from tests.train.tiny import BATCH, EOD, SEQ, run_steps, tiny_config


def mixed_dataset(folder: str):
    """Return the samples of a masked, a packed and an unmasked shard."""
    from megatron_cpt.data.lists.entry import DataEntry
    from megatron_cpt.train.samples.batches import DatasetTokenizer, dataset_config
    from megatron_cpt.train.samples.stage_samples import build_blended_samples

    entries = [DataEntry(prefix=f"{folder}/{name}", tokens=8 * SEQ, corpus=name) for name in ("chat", "packs", "plain")]
    config = dataset_config(tiny_config(), DatasetTokenizer(EOD, 500, None), blend=(["unused"], None))
    return build_blended_samples(entries, 24, config, Path(folder) / "cache")


def masked_steps(config, checkpoint: str, folder: str) -> list[tuple[float, float]]:
    """Return loss and gradient norm of two steps from a checkpoint on the mixed samples."""
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.samples.batches import microbatches
    from megatron_cpt.train.stage.step import train_step
    from megatron_cpt.train.state.checkpointing import load_checkpoint

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    load_checkpoint(Path(checkpoint), model, optimizer)
    dataset = mixed_dataset(folder)
    results = []
    for first in (0, BATCH):
        batches = microbatches(dataset, first, BATCH, config, EOD)
        results.append(train_step(model, optimizer, batches, config, 1e-3))
    finish_parallel()
    return [(result.loss, result.grad_norm) for result in results]


def looked_into(config, checkpoint: str, folder: str):
    """Return (mean loss by hand, |gradient| of each position's logits, their loss mask, logits of changed pieces)."""
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_model_chunks
    from megatron_cpt.train.samples.batches import build_batch, microbatches
    from megatron_cpt.train.stage.step import forward_step
    from megatron_cpt.train.state.checkpointing import load_checkpoint

    initialize_parallel(config)
    (model,) = build_model_chunks(config)
    load_checkpoint(Path(checkpoint), [model], None)
    dataset = mixed_dataset(folder)
    total, count = 0.0, 0
    for batch in microbatches(dataset, 0, BATCH, config, EOD):
        with torch.no_grad():
            logits = model(batch.tokens, batch.position_ids, batch.attention_mask)[..., :500]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        total += float(losses[batch.loss_mask == 1].double().sum())
        count += int(batch.loss_mask.sum())
    kept = []
    model.output_layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output[0]))
    batch = microbatches(dataset, 0, BATCH, config, EOD)[0]
    output, reduce = forward_step(iter([batch]), model)
    kept[-1].retain_grad()
    reduce(output)[0].backward()
    gradients = kept[-1].grad.abs().amax(-1).transpose(0, 1)
    pieces = torch.zeros(1, SEQ, dtype=torch.int64)
    pieces[:, 30:] = 1
    ids = torch.randint(EOD + 1, 500, (1, SEQ + 1), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, :30] = (ids[:, :30] + 100) % 400 + EOD + 1
    with torch.no_grad():
        both = [build_batch(one, config, EOD, pieces=pieces) for one in (ids, other)]
        changed = [model(one.tokens, one.position_ids, one.attention_mask)[0].numpy() for one in both]
    finish_parallel()
    return total / count, gradients.numpy(), batch.loss_mask.numpy(), changed


@pytest.fixture(scope="module")
def data(ranks, tmp_path_factory):
    """A checkpoint of one rank and a folder of shards."""
    folder = tmp_path_factory.mktemp("masked")
    ranks.run(run_steps, 1, tiny_config(), 0, 1, None, str(folder))
    write_conversations(folder / "chat", count=60)
    write_packs(folder / "packs", seq_length=SEQ)
    rng = np.random.default_rng(1)
    plain = [(np.append(rng.integers(EOD + 1, 400, 40), EOD), None) for _ in range(40)]
    write_plain(folder / "plain", [ids for ids, _ in plain])
    return str(folder / "iter_0000001"), str(folder)


@pytest.fixture(scope="module")
def without_noise(ranks, data):
    """Loss and gradient norm of one rank's steps."""
    (steps,) = ranks.run(masked_steps, 1, tiny_config(), *data)
    return steps


def write_plain(prefix: Path, documents):
    from megatron_cpt.data.shards.indexed import bin_path, idx_path, write_index

    np.concatenate(documents).astype(np.int32).tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype(np.int32), np.array([len(ids) for ids in documents]))


def with_noise(config, micro_batch_size=2):
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, neftune_alpha=10.0, micro_batch_size=micro_batch_size),
    )


def test_the_loss_is_that_of_the_learned_tokens(ranks, data, without_noise):
    ((by_hand, gradients, loss_mask, changed),) = ranks.run(looked_into, 1, tiny_config(), *data)
    assert_fp32_rounding(without_noise[0][0], by_hand)
    assert 0 < loss_mask.sum() < loss_mask.size
    assert not gradients[loss_mask == 0].any() and gradients[loss_mask == 1].all()
    assert np.array_equal(changed[0][30:], changed[1][30:])
    assert np.abs(changed[0][:30] - changed[1][:30]).max() > 1e-2


def test_masks_and_noise_are_the_same_under_every_layout(ranks, data, without_noise):
    (expected,) = ranks.run(masked_steps, 1, with_noise(tiny_config()), *data)
    assert abs(expected[0][0] - without_noise[0][0]) > 1e-3
    for config in (
        with_noise(tiny_config(), micro_batch_size=1),
        with_noise(tiny_config(context_parallel_size=2)),
        with_noise(tiny_config(pipeline_model_parallel_size=2)),
        with_noise(tiny_config(tensor_model_parallel_size=2)),
    ):
        for result in ranks.run(masked_steps, 2, config, *data):
            assert_fp32_rounding(result, expected)


def test_chat_packs_and_documents_learn_the_same_by_bounds_as_by_masks(ranks, data, without_noise):
    (steps,) = ranks.run(with_bounds, 1, masked_steps, tiny_config(), *data)
    assert_fp32_rounding(steps, without_noise)


def test_noise_is_uniform_seeded_by_sample_and_scaled_as_published():
    alpha, shape = 5.0, (64, 32)
    noise = embedding_noise([3, 4], 1, alpha, shape)
    largest = alpha / np.sqrt(shape[0] * shape[1])
    assert noise.shape == (64, 2, 32) and noise.abs().max() <= largest
    deviation = largest / np.sqrt(3)  # of a uniform distribution; that of its square is largest^2 x sqrt(4 / 45)
    assert_estimate(float(noise.mean()), 0, deviation=deviation, draws=noise.numel())
    squares = float(noise.square().mean())
    assert_estimate(squares, deviation**2, deviation=largest**2 * np.sqrt(4 / 45), draws=noise.numel())
    assert torch.equal(noise[:, 1], embedding_noise([4], 1, alpha, shape)[:, 0])
    assert not torch.equal(noise[:, 0], noise[:, 1])
    assert not torch.equal(noise, embedding_noise([3, 4], 2, alpha, shape))


def test_packs_in_a_file_begin_with_a_piece(tmp_path):
    """The packs of these tests are packs as the format has them."""
    for _, mask in write_packs(tmp_path / "s"):
        assert mask[0] & PIECE and not loss_of_bits(mask[-3:]).any()
