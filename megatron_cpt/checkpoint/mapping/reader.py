"""config.json key by key: each is taken, known to change nothing, or an error that names it.

`Reader` remembers which keys were taken. The functions take the keys that several architectures share and return fields
of ModelConfig. Both styles are read: that of transformers 5 (`rope_parameters`, `dtype`) and the older one
(`rope_theta`, `rope_scaling`, `torch_dtype`). If a configuration has both, they must have the same meaning; otherwise
they are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megatron_cpt.checkpoint.mapping.keys import HARMLESS, MEANINGS, REQUIRED
from megatron_cpt.errors import CheckpointError

_ANYTHING_OFF: tuple[Any, ...] = (None, False, "", [], {})


class Reader:
    """Takes keys out of a configuration and remembers which."""

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str,
        *,
        ignore: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
        harmless: frozenset[str] = frozenset(),
        required: Mapping[str, tuple[Any, ...]] | None = None,
    ):
        self.config, self.where = config, where
        self.taken = set(ignore)
        self._defaults = defaults or {}
        self._harmless = HARMLESS | harmless
        self._required = {**REQUIRED, **(required or {})}

    def take(self, key: str, *default: Any) -> Any:
        """Return the value of `key`; if absent, transformers' default, or else `default`."""
        self.taken.add(key)
        if key in self.config:
            return self.config[key]
        if key in self._defaults:
            return self._defaults[key]
        if default:
            return default[0]
        raise CheckpointError(f"{self.where}: no {key}. A Hugging Face model configuration is needed.")

    def size(self, key: str, *default: Any) -> int:
        """Return the value of `key`, a positive whole number. Raises: CheckpointError when it is anything else."""
        value = self.take(key, *default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.where}: {key} is {value!r}. A whole number from 1 is needed.")
        return value

    def optional_size(self, key: str) -> int | None:
        """Return the value of `key`, None where it is null or absent. Raises: CheckpointError when it is no size."""
        return None if self.take(key, None) is None else self.size(key)

    def number(self, key: str, *default: Any) -> float:
        """Return the value of `key`, a number. Raises: CheckpointError when it is anything else."""
        value = self.take(key, *default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.where}: {key} is {value!r}. A number is needed.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return the value of `key`, true or false (null counts as false). Raises: CheckpointError for anything else."""
        value = self.take(key, default)
        if value not in (True, False, None):
            raise CheckpointError(f"{self.where}: {key} is {value!r}. True or false is needed.")
        return bool(value)

    def refuse(self, key: str, value: Any, needed: str) -> NoReturn:
        """Raise the error of a value that cannot be computed."""
        meaning = f" ({MEANINGS[key]})" if key in MEANINGS else ""
        raise CheckpointError(
            f"{self.where}: {key} is {value!r}{meaning}. {needed} is what Megatron-Core computes. "
            "This model cannot be converted."
        )

    def left(self) -> dict[str, Any]:
        """Return the keys that nobody took and that are not known to change nothing."""
        return {key: value for key, value in self.config.items() if key not in self.taken | self._harmless}

    def finish(self) -> None:
        """Raise for an unread key that can change the model, or whose value is unsupported."""
        for key, value in self.left().items():
            if key in self._required:
                if value not in self._required[key]:
                    self.refuse(key, value, " or ".join(repr(choice) for choice in self._required[key]))
            elif value not in _ANYTHING_OFF or (value == 0 and value is not False):
                meaning = f"It stands for {MEANINGS[key]}. " if key in MEANINGS else ""
                raise CheckpointError(
                    f"{self.where}: key {key} (value {str(value)[:60]!r}) is not understood. {meaning}Every key must be, "
                    f"because it may change what the model computes. Use --ignore-config {key} if it does not."
                )


def transformer(reader: Reader) -> dict[str, Any]:
    """Return the fields that every decoder has."""
    return {
        "num_layers": reader.size("num_hidden_layers"),
        "hidden_size": reader.size("hidden_size"),
        "ffn_hidden_size": reader.size("intermediate_size"),
        "num_attention_heads": reader.size("num_attention_heads"),
        "vocab_size": reader.size("vocab_size"),
        "max_position_embeddings": reader.size("max_position_embeddings", 2048),
        "layernorm_epsilon": reader.number("rms_norm_eps", 1e-6),
        "init_method_std": reader.number("initializer_range", 0.02),
        "attention_dropout": reader.number("attention_dropout", 0.0),
        "untie_embeddings_and_output_weights": not reader.flag("tie_word_embeddings", False),
    }


def grouped_query_attention(reader: Reader) -> dict[str, Any]:
    """Return the fields of attention with heads that share keys and values."""
    heads = reader.size("num_attention_heads")
    groups = reader.optional_size("num_key_value_heads") or heads
    if heads % groups:
        raise CheckpointError(
            f"{reader.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}. "
            "Each key and value head serves as many query heads. Correct config.json."
        )
    return {
        "num_query_groups": groups,
        "kv_channels": reader.optional_size("head_dim") or reader.size("hidden_size") // heads,
    }


def no_attention_bias(reader: Reader) -> None:
    """Raise for a bias on all four projections of the attention."""
    if reader.flag("attention_bias", False):
        reader.refuse("attention_bias", True, "False (a bias on the output projection has no place)")


def rope(reader: Reader, *, is_latent: bool = False) -> dict[str, Any]:
    """Return the fields of rotary positions, from whichever style the configuration uses."""
    theta, scaling = _rope_settings(reader)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    fields: dict[str, Any] = {"rotary_base": theta}
    if scaling.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        reader.refuse("partial_rotary_factor", reader.config.get("rope_parameters"), "1.0")
    known = {
        "factor": "rope_scaling_factor",
        "original_max_position_embeddings": "rope_original_max_position_embeddings",
    }
    if kind == "llama3":
        known |= {"low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor"}
    elif kind == "yarn":
        names = ("beta_fast", "beta_slow", *(("mscale", "mscale_all_dim") if is_latent else ()))
        known |= {name: f"rope_{name}" for name in names}
        if scaling.pop("attention_factor", None) is not None or scaling.pop("truncate", True) is not True:
            reader.refuse("rope_parameters", scaling, "yarn without attention_factor and with truncate")
    elif kind not in ("default", "linear"):
        reader.refuse("rope_type", kind, "default, linear, llama3 or yarn")
    if kind == "default":
        return fields
    unknown = sorted(set(scaling) - set(known))
    if unknown:
        reader.refuse("rope_parameters", scaling, f"a dictionary without {', '.join(unknown)}")
    fields["rope_scaling_type"] = kind
    return fields | {ours: scaling[theirs] for theirs, ours in known.items() if scaling.get(theirs) is not None}


def _rope_settings(reader: Reader) -> tuple[float, dict[str, Any]]:
    """Return the base and the scaling, without the base, of either style. Raises: CheckpointError when two disagree."""
    older, newer = reader.take("rope_scaling", None), reader.take("rope_parameters", None)
    for key, value in (("rope_scaling", older), ("rope_parameters", newer)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{reader.where}: {key} is {value!r}. A dictionary or null is needed.")
        if any(isinstance(part, dict) for part in (value or {}).values()):
            reader.refuse(key, value, "one rotary embedding for all layers")
    top = reader.number("rope_theta", 10000.0) if reader.take("rope_theta", None) is not None else 10000.0
    in_newer = {**(newer or {})}
    theta = in_newer.pop("rope_theta", None)
    scaling = {**older} if older else in_newer
    theta = scaling.pop("rope_theta", None) or theta
    if newer and older and _meaning(older) != _meaning(newer):
        raise CheckpointError(
            f"{reader.where}: rope_scaling is {older} and rope_parameters {newer}. Both say how positions are encoded and "
            "must mean the same. Correct or remove one of them."
        )
    if theta is not None and "rope_theta" in reader.config and float(theta) != float(top):
        raise CheckpointError(
            f"{reader.where}: rope_theta is {top} and {theta} in rope_parameters. They must be equal. Correct one of them."
        )
    return float(top if theta is None else theta), scaling


def _meaning(scaling: dict[str, Any]) -> dict[str, Any]:
    meant = {key: value for key, value in scaling.items() if key not in ("rope_theta", "type") and value is not None}
    return meant | {"rope_type": scaling.get("rope_type") or scaling.get("type") or "default"}


def window(reader: Reader, *, is_used: bool, counts_full_layers: bool = False) -> dict[str, Any]:
    """Return the attention window. `is_used`: default of `use_sliding_window`; `counts_full_layers`: whether
    `max_window_layers` counts leading layers without a window."""
    size = reader.take("sliding_window", None)
    is_used = reader.flag("use_sliding_window", is_used)
    layer_types = set(reader.take("layer_types", None) or ())
    if len(layer_types) > 1 or layer_types - {"full_attention", "sliding_attention"}:
        reader.refuse("layer_types", sorted(layer_types), "the same attention in every layer")
    if layer_types:
        is_used = layer_types == {"sliding_attention"}
    elif is_used and counts_full_layers and size:
        full_layers = reader.take("max_window_layers", 28)
        if full_layers >= reader.size("num_hidden_layers"):
            is_used = False
        elif full_layers > 0:
            reader.refuse("max_window_layers", full_layers, "the same attention in every layer (0)")
    return {"window_size": reader.size("sliding_window")} if is_used and size else {}


def experts(reader: Reader, *, normalised: bool) -> dict[str, Any]:
    """Return the fields of a router and its experts; `normalised`: default of `norm_topk_prob`."""
    counts = [reader.optional_size(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")]
    found = sorted({count for count in counts if count is not None})
    if len(found) != 1:
        raise CheckpointError(
            f"{reader.where}: {' and '.join(map(str, found)) or 'no number of'} experts. One number is needed, as "
            "num_local_experts, num_experts or n_routed_experts. Correct config.json."
        )
    normalised = reader.flag("norm_topk_prob", normalised)
    topk = reader.optional_size("num_experts_per_tok") or 2
    if normalised and topk == 1:
        reader.refuse("num_experts_per_tok", 1, "2 or more where weights are normalised (one expert's is always 1)")
    return {
        "num_moe_experts": found[0],
        "moe_ffn_hidden_size": reader.size("moe_intermediate_size", reader.config.get("intermediate_size")),
        "moe_router_topk": topk,
        "moe_aux_loss_coeff": reader.number("router_aux_loss_coef", 0.0),
        "moe_router_pre_softmax": not normalised,
    }
