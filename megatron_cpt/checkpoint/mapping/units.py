"""Which Hugging Face tensors make which Megatron tensor, spelled out for a model and held against what a folder has.

The rules are data of each architecture (`families/`). A Hugging Face tensor without a rule, or a rule without a tensor,
is an error in `check_coverage`.
"""

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_cpt.checkpoint.mapping.families.known import FAMILIES
from megatron_cpt.checkpoint.mapping.family import Family
from megatron_cpt.checkpoint.mapping.kinds import Rule, Shape
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError

COMPUTED_TENSORS = ("*.rotary_emb.inv_freq",)
"""Tensors in older folders that follow from the configuration."""


@dataclass(frozen=True)
class Unit:
    """One step of a conversion: a Megatron tensor, or one expert of it, and the Hugging Face tensors it is made of."""

    rule: Rule
    """Of this layer and expert."""
    shape: Shape
    """Shape on Megatron's side, without the expert axis."""
    hf_shapes: tuple[Shape, ...]
    expert: int | None = None
    num_experts: int | None = None

    @property
    def key(self) -> str:
        """The Megatron tensor's name."""
        return self.rule.mcore

    @property
    def hf(self) -> tuple[str, ...]:
        """The Hugging Face tensors' names."""
        return self.rule.hf

    @property
    def is_gated(self) -> bool:
        """Whether the rows are those of a gate, then as many of an up-projection."""
        return self.rule.is_gated

    @property
    def global_shape(self) -> Shape:
        """The whole Megatron tensor's shape."""
        return self.shape if self.num_experts is None else (self.num_experts, *self.shape)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Start of the unit in the whole Megatron tensor."""
        start = (0,) * len(self.shape)
        return start if self.expert is None else (self.expert, *start)

    def rows(self, model: ModelConfig) -> int | None:
        """Return how many first rows mean something, None for all of them."""
        return self.rule.rows(model)

    def fits(self, shape: Shape, model: ModelConfig) -> bool:
        """Return whether a stored tensor of `shape` has what is needed: more rows of a vocabulary are padding."""
        rows = self.rows(model)
        return shape == self.shape if rows is None else shape[0] >= rows and shape[1:] == self.shape[1:]

    def to_mcore(self, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        """Return the Megatron tensor, with the expert axis where there is one."""
        return self.rule.to_mcore(tensors, model)

    def to_hf(self, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Return the Hugging Face tensors; the inverse of `to_mcore`."""
        return self.rule.to_hf(tensor, model)


def family_of(architecture: str) -> Family:
    """Return the family of a Hugging Face architecture. Raises: CheckpointError naming the known ones."""
    if architecture not in FAMILIES:
        raise CheckpointError(f"architecture {architecture} is not known. Known: {', '.join(FAMILIES)}.")
    return FAMILIES[architecture]


def units(model: ModelConfig, family: Family) -> list[Unit]:
    """Return all steps of converting `model`, in the order of the layers."""
    rules = list(family.embedding)
    for layer in range(model.num_layers):
        rules += [rule.named(i=layer) for rule in family.layer_rules(model, layer)]
    rules += family.final_norm
    if model.untie_embeddings_and_output_weights:
        rules += family.output_layer
    return [unit for rule in rules for unit in _units(rule, model)]


def _units(rule: Rule, model: ModelConfig) -> Iterable[Unit]:
    if not rule.is_per_expert:
        yield Unit(rule, rule.size(model), rule.hf_shapes(model))
        return
    for expert in range(model.num_moe_experts or 0):
        yield Unit(rule.named(e=expert), rule.size(model), rule.hf_shapes(model), expert, model.num_moe_experts)


def check_coverage(
    model_units: Sequence[Unit], names: Collection[str], where: str, skip: Sequence[str] = ()
) -> list[str]:
    """Return the names that are left out on purpose; every other one must be claimed, and every claim be there.

    `skip` holds globs of tensors to leave out. Raises: CheckpointError naming the first unclaimed and missing tensors.
    """
    claimed = {name for unit in model_units for name in unit.hf}
    present = set(names)
    left = sorted(present - claimed)
    skipped = [name for name in left if any(fnmatch.fnmatchcase(name, glob) for glob in (*COMPUTED_TENSORS, *skip))]
    unclaimed = sorted(set(left) - set(skipped))
    missing = sorted(claimed - present)
    if unclaimed:
        raise CheckpointError(
            f"{where}: {len(unclaimed)} tensors have no place in Megatron's model, the first are {', '.join(unclaimed[:3])}. "
            "Every weight must be converted. Use --skip-tensors GLOB to leave out what is not wanted."
        )
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing, the first are {', '.join(missing[:3])}. "
            "The folder is incomplete or its config.json belongs to another model."
        )
    return skipped
