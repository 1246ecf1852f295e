"""The loss of a step: padded vocabulary rows do not count, z-loss is its formula, bad steps change nothing."""

import dataclasses

import numpy as np

from tests.tolerances import assert_bf16_rounding, assert_fp32_rounding
from tests.train.tiny import VOCAB, run_steps, tiny_config


def losses_of(config, padded):
    """Return (loss of GPTModel, loss from its logits without the padded rows, z-loss from them) on one batch."""
    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_model_chunks
    from tests.train.tiny import batches

    initialize_parallel(config)
    (model,) = build_model_chunks(config)
    batch = batches(config, 0)[0]
    with torch.no_grad():
        loss = model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels)
        logits = model(batch.tokens, batch.position_ids, batch.attention_mask)
    assert logits.shape[-1] == padded
    real = logits[..., :VOCAB].float()
    plain = torch.nn.functional.cross_entropy(real.flatten(0, 1), batch.labels.flatten(), reduction="none")
    finish_parallel()
    return loss.flatten().tolist(), plain.tolist(), real.logsumexp(-1).square().flatten().tolist()


def test_padded_rows_do_not_count(ranks):
    for multiple, padded in ((1, 500), (128, 512), (1024, 1024)):
        config = tiny_config(model={"make_vocab_size_divisible_by": multiple})
        ((loss, plain, _),) = ranks.run(losses_of, 1, config, padded)
        assert_fp32_rounding(loss, plain)


def test_z_loss_is_the_squared_log_normaliser(ranks):
    config = tiny_config()
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, z_loss_coeff=0.01))
    ((loss, plain, squares),) = ranks.run(losses_of, 1, config, 512)
    assert_fp32_rounding(loss, np.array(plain) + 0.01 * np.array(squares))


def test_z_loss_is_the_same_under_tensor_parallelism(ranks, tmp_path):
    def with_z(config):
        return dataclasses.replace(config, training=dataclasses.replace(config.training, z_loss_coeff=0.01))

    ranks.run(run_steps, 1, with_z(tiny_config()), 0, 1, None, str(tmp_path))
    checkpoint = str(tmp_path / "iter_0000001")
    (one,) = ranks.run(run_steps, 1, with_z(tiny_config()), 1, 3, checkpoint, None)
    (two, _) = ranks.run(run_steps, 2, with_z(tiny_config(tensor_model_parallel_size=2)), 1, 3, checkpoint, None)
    assert_fp32_rounding(two, one)
    (without,) = ranks.run(run_steps, 1, tiny_config(), 1, 2, checkpoint, None)
    assert one[0][0] > without[0][0] + 0.1


def split_loss(config, vocab_size):
    """Return losses `[s, b]` and this rank's gradient of the vocabulary-parallel loss, and those of the whole vocabulary."""
    import torch
    from megatron.core import parallel_state

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.loss import vocab_parallel_loss

    initialize_parallel(config)
    group = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(0)
    whole = (torch.randn(5, 3, 24, generator=generator) * 4).requires_grad_()
    labels = torch.randint(vocab_size, (5, 3), generator=generator)
    weight = torch.rand(5, 3, generator=generator)
    part = whole.detach().chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
    loss = vocab_parallel_loss(part, labels, vocab_size=vocab_size, z_loss_coeff=0.1, group=group)
    (loss * weight).sum().backward()
    real = whole[..., :vocab_size]
    plain = torch.nn.functional.cross_entropy(real.permute(0, 2, 1), labels, reduction="none")
    plain = plain + 0.1 * real.logsumexp(-1).square()
    (plain * weight).sum().backward()
    expected = whole.grad.chunk(group.size(), -1)[group.rank()]
    halves = vocab_parallel_loss(part.detach().bfloat16(), labels, vocab_size=vocab_size, z_loss_coeff=0.1, group=group)
    finish_parallel()
    return [tensor.detach().numpy() for tensor in (loss, part.grad, plain, expected, halves)]


def test_the_loss_of_a_gpu_is_that_of_the_whole_vocabulary(ranks):
    """It computes what it does without compilation on CPU too; a rank may have padded rows only."""
    for world_size, vocab_size in ((1, 24), (1, 19), (2, 19), (2, 11)):
        config = tiny_config(tensor_model_parallel_size=world_size)
        for loss, gradient, plain, expected, halves in ranks.run(split_loss, world_size, config, vocab_size):
            assert_fp32_rounding(loss, plain)
            assert_fp32_rounding(gradient, expected, of_largest=True)
            assert halves.dtype == np.float32
            # the logits are rounded once, and the largest are three times a loss
            assert_bf16_rounding(halves, plain, roundings=9)


def poisoned_step(config):
    """Return whether a step with an infinite weight updated anything, and whether the parameters stayed."""
    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model, unwrap
    from megatron_cpt.train.stage.step import train_step
    from tests.train.tiny import batches

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    weight = unwrap(model[0]).decoder.layers[0].mlp.linear_fc1.weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    before = [parameter.detach().clone() for parameter in model[0].parameters()]
    result = train_step(model, optimizer, batches(config, 0), config, 1e-3)
    same = all(
        torch.equal(old.nan_to_num(), new.detach().nan_to_num())
        for old, new in zip(before, model[0].parameters(), strict=True)
    )
    finish_parallel()
    return result.is_updated, same


def test_a_loss_that_is_not_finite_leaves_the_parameters_alone(ranks):
    assert ranks.run(poisoned_step, 1, tiny_config()) == [(False, True)]
