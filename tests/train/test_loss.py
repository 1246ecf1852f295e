"""The loss of a step: padded vocabulary rows do not count, z-loss is its formula, bad steps change nothing."""

import dataclasses

import numpy as np

from tests.train.tiny import VOCAB, run_steps, tiny_config


def losses_of(config, padded):
    """Return (loss of GPTModel, loss from its logits without the padded rows, z-loss from them) on one batch."""
    import torch

    from megatron_cpt.train.model import build_model_chunks
    from megatron_cpt.train.parallel import finish_parallel, initialize_parallel
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
        np.testing.assert_allclose(loss, plain, rtol=1e-5)


def test_z_loss_is_the_squared_log_normaliser(ranks):
    config = tiny_config()
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, z_loss_coeff=0.01))
    ((loss, plain, squares),) = ranks.run(losses_of, 1, config, 512)
    np.testing.assert_allclose(loss, np.array(plain) + 0.01 * np.array(squares), rtol=1e-5)


def test_z_loss_is_the_same_under_tensor_parallelism(ranks, tmp_path):
    def with_z(config):
        return dataclasses.replace(config, training=dataclasses.replace(config.training, z_loss_coeff=0.01))

    ranks.run(run_steps, 1, with_z(tiny_config()), 0, 1, None, str(tmp_path))
    checkpoint = str(tmp_path / "iter_0000001")
    (one,) = ranks.run(run_steps, 1, with_z(tiny_config()), 1, 3, checkpoint, None)
    (two, _) = ranks.run(run_steps, 2, with_z(tiny_config(tensor_model_parallel_size=2)), 1, 3, checkpoint, None)
    np.testing.assert_allclose(two, one, rtol=5e-6)
    (without,) = ranks.run(run_steps, 1, tiny_config(), 1, 2, checkpoint, None)
    assert one[0][0] > without[0][0] + 0.1


def poisoned_step(config):
    """Return whether a step with an infinite weight updated anything, and whether the parameters stayed."""
    import torch

    from megatron_cpt.train.model import build_training_model, unwrap
    from megatron_cpt.train.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.step import train_step
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
