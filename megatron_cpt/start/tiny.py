"""The model and the text of `init --model tiny`: made on this machine in seconds, to see every step work.

The model is a Llama of two layers with random weights and a byte-level tokenizer of 2048 tokens. The text comes from this Python:
`python`, the source of its standard library, and `prose`, the docstrings in it. Nothing is fetched.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_cpt.files import whole_dir, write_text

VOCAB_SIZE = 2048
CONTEXT = 128
EOD = "<|endoftext|>"
CORPORA = {"python": 1_500_000, "prose": 500_000}
"""Bytes of text of each corpus, about."""
_LEFT_OUT = {"test", "tests", "idlelib", "encodings", "site-packages", "__pycache__", "lib2to3", "pydoc_data"}


def write_texts(folder: Path) -> dict[str, Path]:
    """Write a `.jsonl` file per corpus into `folder`; return corpus -> file."""
    texts: dict[str, list[str]] = {name: [] for name in CORPORA}
    sizes = dict.fromkeys(CORPORA, 0)
    for source in _sources():
        for name, found in (("python", [source]), ("prose", _docstrings(source))):
            for text in found if sizes[name] < CORPORA[name] else []:
                texts[name].append(text)
                sizes[name] += len(text.encode())
        if all(sizes[name] >= CORPORA[name] for name in CORPORA):
            break
    paths = {name: folder / f"{name}.jsonl" for name in texts}
    for name, path in paths.items():
        write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[name]))
    return paths


def write_model(folder: Path, texts: Iterator[str]) -> None:
    """Write the model and a tokenizer trained on `texts` as a Hugging Face folder, which must not exist."""
    # heavy: only the tiny model needs them here
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(EOD),
        tie_word_embeddings=False,
    )
    with whole_dir(folder) as temporary:
        LlamaForCausalLM(config).save_pretrained(temporary)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD).save_pretrained(temporary)


def _sources() -> Iterator[str]:
    """Yield the source of each module of the standard library, in the order of the names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.intersection(path.relative_to(root).parts) or path.stat().st_size > 60_000:
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def _docstrings(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text and len(text) > 200]
