"""What stands in for CUDA on CPU does not disturb anything else."""

import torch


def hugging_face_after_substitution(_):
    """Return whether rotary frequencies of a transformers model are right under the substitutions."""
    from megatron_cpt.train.backend import cpu

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
    from megatron_cpt.train.backend import cpu

    assert cpu.is_cpu() != torch.cuda.is_available()
    assert torch.zeros(1).type() == "torch.FloatTensor"
