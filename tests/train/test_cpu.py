"""What stands in for CUDA on CPU does not disturb anything else."""

import torch

from tests.tolerances import assert_fp32_rounding


def hugging_face_after_substitution(_):
    """Return the rotary frequencies of a transformers model under the substitutions, and a tensor's device."""
    from megatron_cpt.train.backend import cpu

    cpu.substitute()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    return model.model.rotary_emb.inv_freq.tolist(), str(torch.zeros(1, device="cuda").device)


def test_transformers_models_keep_their_rotary_frequencies(ranks):
    ((frequencies, device),) = ranks.run(hugging_face_after_substitution, 1, None)
    assert device == "cpu"
    assert_fp32_rounding(frequencies, [10000 ** (-n / 8) for n in (0, 2, 4, 6)], roundings=16)  # a power in fp32


def test_nothing_is_substituted_in_a_process_that_did_not_ask():
    from megatron_cpt.train.backend import cpu

    assert cpu.is_cpu() != torch.cuda.is_available()
    assert torch.zeros(1).type() == "torch.FloatTensor"
