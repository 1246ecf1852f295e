"""A language model to evaluate: a Hugging Face folder, or a Megatron checkpoint converted to one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from megatron_cpt.data.chat.template import ChatTemplate, load_template
from megatron_cpt.errors import CheckpointError, DataError
from megatron_cpt.evaluate.models.folders import hf_folder

_ENCODE_BATCH = 256


class LanguageModel:
    """A causal language model with its tokenizer, on this machine's GPU if there is one."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer
        self.template = _own_template(tokenizer)
        tokenizer.model_max_length = int(1e30)  # documents are cut into windows here; no warning is due
        self.context: int = getattr(model.config, "max_position_embeddings", None) or 2048
        start = "bos" if tokenizer.bos_token_id is not None else "eos"
        start_id = tokenizer.bos_token_id if start == "bos" else tokenizer.eos_token_id
        if start_id is None:
            raise CheckpointError(f"{name}: its tokenizer has neither a BOS nor an EOS token. One must start a text.")
        self.start_id: int = start_id
        self.start_token = f"{start} {tokenizer.convert_ids_to_tokens(start_id)}"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text without special tokens around it."""
        tokens: list[list[int]] = []
        for index in range(0, len(texts), _ENCODE_BATCH):
            tokens += self.tokenizer(texts[index : index + _ENCODE_BATCH], add_special_tokens=False)["input_ids"]
        return tokens

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [b, s, v] of tokens [b, s]."""
        return self.model(input_ids=tokens, use_cache=False).logits


def _own_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the chat template in the tokenizer's folder, None where there is none."""
    folder = Path(tokenizer.name_or_path)
    try:
        return load_template(folder) if folder.is_dir() else None
    except DataError:
        return None


@contextlib.contextmanager
def loaded_model(name: str, path: Path, tokenizer_path: Path | None = None) -> Iterator[LanguageModel]:
    """Yield the model in `path`, a Hugging Face folder or a Megatron checkpoint.

    The tokenizer is the folder's own, else `tokenizer_path`.

    Raises: CheckpointError when there is no model or no tokenizer.
    """
    with hf_folder(path, tokenizer_path) as folder:
        yield LanguageModel(name, load_hf_model(folder), load_hf_tokenizer(folder, tokenizer_path))


def load_hf_model(path: Path) -> PreTrainedModel:
    """Return the causal language model of a Hugging Face folder, in the precision it is stored in, fp32 on CPU."""
    disable_progress_bar()
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as problem:
        raise CheckpointError(f"{path}: cannot be loaded ({' '.join(str(problem).split())[:300]}).") from None


def load_hf_tokenizer(path: Path, fallback: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `path`, else the one in `fallback`."""
    for folder in (path, fallback):
        if folder is not None and ((folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists()):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    raise CheckpointError(f"{path}: no tokenizer in it. One is needed to read text. Name its folder with --tokenizer.")
