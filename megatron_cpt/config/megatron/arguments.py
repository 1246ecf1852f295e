"""Keyword arguments of Megatron-Core objects and Megatron-LM flags from our settings; imports no megatron.

`config/megatron/rows.py` maps settings to arguments; this module has the constants that every model shares.
`train/model/build.py` adds what only torch can say (dtypes, the activation function, fusions).
"""

from typing import Any

from megatron_cpt.config.megatron.rows import ROWS
from megatron_cpt.config.megatron.values import is_mla, is_mla_with_yarn, is_moe, is_muon, is_yarn
from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.fields import setting_value
from megatron_cpt.config.settings.schema import WHOLE_STAGE, ModelConfig, RunConfig

TARGETS = (
    "TransformerConfig",
    "MLATransformerConfig",
    "GPTModel",
    "OptimizerConfig",
    "DistributedDataParallelConfig",
    "GPTDatasetConfig",
)

CONSTANTS: dict[str, dict[str, Any]] = {
    "TransformerConfig": {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
    },
    "MLATransformerConfig": {},
    "GPTModel": {"position_embedding_type": "rope", "rotary_percent": 1.0},
    "OptimizerConfig": {"decoupled_weight_decay": True},
    "DistributedDataParallelConfig": {},
    # RoPE ignores position ids: positions start anew in each document through packed sequences, never through ids.
    "GPTDatasetConfig": {"reset_position_ids": False},
}
"""Arguments that are the same for every model here."""

MUON_CONSTANTS = {
    "muon_nesterov": True,
    "muon_scale_mode": "spectral",
    "muon_extra_scale_factor": 0.2,
    "muon_tp_mode": "distributed",
}
"""Arguments of Muon as in Moonlight (arXiv:2502.16982, equation 4): 0.2 sqrt(max(rows, columns)) matches AdamW's update
size. The default of the tensor-parallel mode orthogonalises each rank's part for itself: the result would depend on the
layout."""

MOE_CONSTANTS = {"moe_router_dtype": "fp32", "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": False}
"""Arguments of every mixture of experts; `train` switches grouped GEMM on where Transformer Engine is installed."""

# fmt: off
CONSTANT_FLAGS = [
    "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope",
    "--split", "100,0,0", "--ckpt-format", "torch_dist",
]
# fmt: on
MOE_CONSTANT_FLAGS = ["--moe-router-dtype", "fp32", "--moe-token-dispatcher-type", "alltoall"]


def megatron_arguments(config: RunConfig, target: str) -> dict[str, Any]:
    """Return the keyword arguments of a Megatron-Core object, one of `TARGETS`.

    MLATransformerConfig is a TransformerConfig and takes its arguments too.
    """
    if target not in TARGETS:
        raise ValueError(f"{target}: no such target; known: {', '.join(TARGETS)}")
    kinds = ("TransformerConfig", target) if target == "MLATransformerConfig" else (target,)
    arguments: dict[str, Any] = {}
    for kind in kinds:
        arguments |= CONSTANTS[kind]
        for row in ROWS:
            if row.when(config):
                names = [name.partition(".")[2] for name in row.arguments if name.partition(".")[0] == kind]
                arguments |= dict.fromkeys(names, row.argument_value(config)) if names else {}
    if target == "OptimizerConfig" and is_muon(config):
        arguments |= MUON_CONSTANTS
    if "TransformerConfig" in kinds and is_moe(config):
        arguments |= MOE_CONSTANTS | {"moe_router_load_balancing_type": _load_balancing(config.model)}
    return arguments


def megatron_flags(config: RunConfig) -> list[str]:
    """Return the Megatron-LM command-line arguments that describe the same run, flag and value as separate items.

    `settings_without_flag` lists the settings that Megatron-LM cannot express.
    """
    flags = list(CONSTANT_FLAGS)
    for row in ROWS:
        if row.flag is None or not row.when(config):
            continue
        value = (row.flag_value or row.argument_value)(config)
        if value is True:
            flags.append(row.flag)
        elif isinstance(value, tuple):
            flags += [row.flag, *map(_flag_text, value)]
        elif value is not None and value is not False:
            flags += [row.flag, _flag_text(value)]
    flags += _grouped_query_flags(config.model) + _rope_flags(config)
    if is_moe(config):
        flags += [*MOE_CONSTANT_FLAGS, "--moe-router-load-balancing-type", _load_balancing(config.model)]
    if is_muon(config):
        for name, value in MUON_CONSTANTS.items():
            flag = "--" + name.replace("_", "-")
            flags += [flag] if value is True else [flag, _flag_text(value)]
    if config.data.tokenizer is not None:
        flags += ["--tokenizer-type", "HuggingFaceTokenizer"]
    return flags


def settings_without_flag(config: RunConfig) -> list[str]:
    """Return the training settings that matter in this run and that no Megatron-LM flag expresses."""
    found = [
        key
        for key in (
            "training.z_loss_coeff",
            "training.neftune_alpha",
            "data.fim_rate",
            "data.prompt_loss_weight",
            "schedule.lr_hold",
            "schedule.lr_hold_start",
            "data.mix",
            "data.skip_iterations",
        )
        if setting_value(config, key)
    ]
    if is_yarn(config) and not is_mla(config):
        found += [
            "model.rope_scaling_type",
            "model.rope_scaling_factor",
            "model.rope_beta_fast",
            "model.rope_beta_slow",
        ]
        found.append("model.rope_original_max_position_embeddings")
    elif is_yarn(config):
        found += [row.setting for row in ROWS if row.when == is_mla_with_yarn and row.flag is None]
    if config.schedule.lr_decay_style.startswith("infinite"):
        found.append("schedule.lr_decay_style")
    if config.schedule.lr_cooldown.amount and config.schedule.lr_cooldown_style == "geometric":
        found.append("schedule.lr_cooldown_style")
    if config.schedule.lr_cooldown.amount and config.schedule.lr_decay_style == "inverse-square-root":
        found.append("schedule.lr_cooldown")
    if config.optimizer.weight_decay_incr != WHOLE_STAGE:
        found.append("optimizer.weight_decay_incr")
    return sorted(found)


def _load_balancing(model: ModelConfig) -> str:
    return "aux_loss" if model.moe_aux_loss_coeff > 0 else "none"


def _grouped_query_flags(model: ModelConfig) -> list[str]:
    is_grouped = derived.num_query_groups(model) != model.num_attention_heads
    return ["--group-query-attention"] if is_grouped else []


def _rope_flags(config: RunConfig) -> list[str]:
    model = config.model
    if is_mla(config):
        kind = "yarn" if is_yarn(config) else "rope"
        return ["--rope-type", kind, "--rotary-scaling-factor", _flag_text(model.rope_scaling_factor)]
    if model.rope_scaling_type == "llama3":
        return ["--rope-scaling-factor", _flag_text(model.rope_scaling_factor)]
    if model.rope_scaling_type == "linear":
        return ["--rotary-seq-len-interpolation-factor", _flag_text(model.rope_scaling_factor)]
    return []


def _flag_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)  # a pattern of layers has no blanks
