"""Definition of an architecture; one file each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_cpt.checkpoint.mapping.blocks import EMBEDDING, FINAL_NORM, OUTPUT_LAYER, layer_rules
from megatron_cpt.checkpoint.mapping.kinds import Rule
from megatron_cpt.checkpoint.mapping.reader import Reader
from megatron_cpt.config.settings.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: its tensors, the keys of its config.json in both directions, and those that change nothing."""

    architecture: str
    """As config.json's `architectures` names it."""
    model_type: str
    """The `model_type` of config.json; if two architectures share one, the first of `FAMILIES` is used."""
    read: Callable[[Reader], dict[str, Any]]
    """Returns the fields of ModelConfig after taking the keys that it understands."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Returns the keys of config.json that describe a model, but for `architectures` and `model_type`."""
    layer_rules: Callable[[ModelConfig, int], Sequence[Rule]] = layer_rules
    """Returns the rules of one layer."""
    embedding: tuple[Rule, ...] = EMBEDDING
    final_norm: tuple[Rule, ...] = FINAL_NORM
    output_layer: tuple[Rule, ...] = OUTPUT_LAYER
    other_types: tuple[str, ...] = ()
    """More `model_type`s of the same architecture."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' defaults for absent keys, if they differ from the reader's defaults."""
    harmless: frozenset[str] = frozenset()
    """Keys of this architecture that do not change the model's computation, for any value."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that hold one of these values, or are not there."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Pairs of names for one key: transformers 4 reads the first, 5 writes the second."""

    def repeated_output(self, model: ModelConfig) -> tuple[str | None, str]:
        """Return the Hugging Face names of the output layer, where it repeats tied embeddings (else None), and of these."""
        embedding = self.embedding[0].hf[0]
        return (None if model.untie_embeddings_and_output_weights else self.output_layer[0].hf[0]), embedding
