"""Tokenizers trained on the spot, small enough to be made in every test session."""

import json
from pathlib import Path

import pytest

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and doesn't look back.",
    "def tokenize(text: str) -> list[int]:\n    return [ord(c) for c in text]\n",
    "人工知能の研究は、言葉から始まった。大規模な言語モデルを学習する。",
    "中文文本没有空格，所以分词更难。持续预训练需要新的语料。",
    "Numbers such as 3.14159, 2026 and 1,000,000 are split in threes.",
]


def build_bpe(*, normalizer: object = None, special_tokens: tuple[str, ...] = ("<|end_of_text|>",)) -> object:
    """Return a byte-level BPE tokenizer with Llama 3's split pattern and 500 tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def save_tokenizer(tokenizer: object, folder: Path, eos: str = "<|end_of_text|>") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory):
    return save_tokenizer(build_bpe(), tmp_path_factory.mktemp("tokenizers") / "bpe")


CHAT_TOKENS = (
    "<|end_of_text|>",
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>"),
    *("<s>", "</s>", "[INST]", "[/INST]"),
)


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory):
    """A tokenizer with the control tokens of several chat formats, which trims offsets as Llama 3's does; no template."""
    from tokenizers import processors

    tokenizer = build_bpe(special_tokens=CHAT_TOKENS)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    folder = save_tokenizer(tokenizer, tmp_path_factory.mktemp("tokenizers") / "chat")
    settings = {"eos_token": "<|end_of_text|>", "bos_token": {"__type": "AddedToken", "content": "<|begin_of_text|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """A SentencePiece BPE model with Llama 2's settings."""
    return _train_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "spm_bpe", "bpe")


@pytest.fixture(scope="session")
def unigram_model(tmp_path_factory):
    return _train_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "spm_unigram", "unigram")


def _train_sentencepiece(prefix: Path, model_type: str) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(prefix),
        model_type=model_type,
        vocab_size=450,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return prefix.with_suffix(".model")
