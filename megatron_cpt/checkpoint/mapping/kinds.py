"""How one Megatron tensor is made of Hugging Face tensors: a class for each kind, exact in both directions.

A rule names the Megatron tensor (Transformer Engine's name) and the Hugging Face tensors it is made of; `{i}` is a layer,
`{e}` an expert. Its shape follows from the configuration and is written with the rule. A kind that this file lacks is a
subclass of `Rule` in the file of the architecture that needs it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from megatron_cpt.checkpoint.mapping.transforms import (
    merge_gate_up,
    merge_qkv,
    pad_vocab,
    split_gate_up,
    split_qkv,
    strip_vocab,
)
from megatron_cpt.config.settings.derived import kv_channels, num_query_groups, padded_vocab_size
from megatron_cpt.config.settings.schema import ModelConfig

Shape = tuple[int, ...]
Size = Callable[[ModelConfig], Shape]


@dataclass(frozen=True)
class Rule(ABC):
    """The Megatron tensor `mcore` of shape `size(model)` and the Hugging Face tensors `hf` that it is made of."""

    mcore: str
    hf: tuple[str, ...]
    size: Size

    is_gated = False
    """Whether the rows are those of a gate, then as many of an up-projection: some formats keep or split the halves apart."""
    is_per_expert = False
    """Whether there is one for each expert, along the first axis of the Megatron tensor."""

    @abstractmethod
    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """Return the shapes of the Hugging Face tensors."""

    @abstractmethod
    def to_mcore(self, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        """Return the Megatron tensor."""

    @abstractmethod
    def to_hf(self, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Return the Hugging Face tensors; the inverse of `to_mcore`."""

    def rows(self, model: ModelConfig) -> int | None:
        """Return how many first rows of the Megatron tensor mean something, None for all of them."""
        return None

    def named(self, **places: int) -> Self:
        """Return the rule with `{i}` and `{e}` replaced."""
        mcore, hf = self.mcore, self.hf
        for letter, number in places.items():
            mcore = mcore.replace(f"{{{letter}}}", str(number))
            hf = tuple(name.replace(f"{{{letter}}}", str(number)) for name in hf)
        return replace(self, mcore=mcore, hf=hf)


@dataclass(frozen=True)
class Copy(Rule):
    """The same tensor on both sides."""

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """Return the one shape."""
        return (self.size(model),)

    def to_mcore(self, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        """Return the tensor."""
        return tensors[0]

    def to_hf(self, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Return the tensor."""
        return (tensor,)


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value projections, in Megatron one tensor: for each group its queries, its key, its value."""

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """Return the shapes of query, key and value."""
        head, groups = kv_channels(model), num_query_groups(model)
        rows = (model.num_attention_heads * head, groups * head, groups * head)
        return tuple((count, *self.size(model)[1:]) for count in rows)

    def to_mcore(self, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        """Return the merged projection."""
        return merge_qkv(tensors[0], tensors[1], tensors[2], num_query_groups(model))

    def to_hf(self, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Return query, key and value."""
        return split_qkv(tensor, num_query_groups(model), model.num_attention_heads)


@dataclass(frozen=True)
class GateUp(Rule):
    """Gate and up-projection, in Megatron one tensor: the gate's rows, then the up-projection's."""

    is_gated = True

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """Return the shapes of gate and up-projection."""
        rows, *rest = self.size(model)
        return ((rows // 2, *rest),) * 2

    def to_mcore(self, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        """Return the merged projection."""
        return merge_gate_up(tensors[0], tensors[1])

    def to_hf(self, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Return gate and up-projection."""
        return split_gate_up(tensor)


@dataclass(frozen=True)
class Vocabulary(Rule):
    """A row for each token id, in Megatron with padding rows after them."""

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """Return the shape without padding."""
        return ((model.vocab_size, *self.size(model)[1:]),)

    def to_mcore(self, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        """Return the padded tensor."""
        return pad_vocab(tensors[0], padded_vocab_size(model))

    def to_hf(self, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Return the tensor without padding."""
        return (strip_vocab(tensor, model.vocab_size),)

    def rows(self, model: ModelConfig) -> int | None:
        """Return the rows without padding."""
        return model.vocab_size


@dataclass(frozen=True, init=False)
class Experts(Rule):
    """One tensor of every expert, by the rule `of`; the expert is the first axis of the Megatron tensor."""

    of: Rule
    is_per_expert = True

    def __init__(self, of: Rule):
        object.__setattr__(self, "of", of)
        for name in ("mcore", "hf", "size", "is_gated"):
            object.__setattr__(self, name, getattr(of, name))

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """Return the shapes of one expert's tensors."""
        return self.of.hf_shapes(model)

    def to_mcore(self, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        """Return one expert's tensor, the expert axis first."""
        return self.of.to_mcore(tensors, model).unsqueeze(0)

    def to_hf(self, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Return one expert's tensors."""
        return self.of.to_hf(tensor.squeeze(0), model)

    def named(self, **places: int) -> "Experts":
        """Return the rule with `{i}` and `{e}` replaced."""
        return Experts(self.of.named(**places))
