"""What stands in for CUDA on CPU does not disturb anything else."""

import torch


def adam_difference(_):
    """Return the largest difference between our AdamW and torch's over ten steps, and our state's keys."""
    from megatron_cpt.train.cpu import CPUFusedAdam

    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = CPUFusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(10):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
    group = optimizers[0].param_groups[0]
    return difference, sorted(optimizers[0].state[ours[0]]), group["step"]


def test_our_adamw_is_torchs_with_the_step_in_the_group(ranks):
    ((difference, state, step),) = ranks.run(adam_difference, 1, None)
    assert difference < 1e-6
    assert state == ["exp_avg", "exp_avg_sq"] and step == 10


def hugging_face_after_substitution(_):
    """Return whether rotary frequencies of a transformers model are right under the substitutions."""
    from megatron_cpt.train import cpu

    cpu.substitute()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    expected = 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    return bool(torch.allclose(model.model.rotary_emb.inv_freq, expected)), str(torch.zeros(1, device="cuda").device)


def test_transformers_models_keep_their_rotary_frequencies(ranks):
    assert ranks.run(hugging_face_after_substitution, 1, None) == [(True, "cpu")]


def test_nothing_is_substituted_in_a_process_that_did_not_ask():
    from megatron_cpt.train import cpu

    assert cpu.is_cpu() != torch.cuda.is_available()
    assert torch.zeros(1).type() == "torch.FloatTensor"
