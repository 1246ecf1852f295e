"""A tiny Llama with a byte-level tokenizer, and run directories written by hand."""

import json
from pathlib import Path

import pytest

EOD = "<|endoftext|>"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Return a Hugging Face folder: 2 layers, context 32, a tokenizer whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def write_run(tmp_path):
    """Return a function that writes a run directory from metrics records."""

    def write(
        variant: str, records: list[dict], *, parent: str | None = None, blend: dict[str, int] | None = None
    ) -> Path:
        run = tmp_path / "runs" / "demo" / "demo-5m" / "300K" / variant
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        source = f"variant:{parent}" if parent else "models/base"
        (run / "config.yaml").write_text(f"task: demo\ninit:\n  from_path: {source}  # tasks/demo/task.yaml\n")
        if blend:
            (run / "train_data.yaml").write_text(
                "".join(
                    f"- {{tokens: {tokens}, prefix: 'x/{name}_text_document', corpus: {name}}}\n"
                    for name, tokens in blend.items()
                )
            )
        return run

    return write
