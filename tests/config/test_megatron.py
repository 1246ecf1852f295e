"""The table covers every setting, and every argument it names exists in the installed megatron-core."""

import dataclasses
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpt.config.megatron.arguments import (
    CONSTANTS,
    MOE_CONSTANTS,
    TARGETS,
    megatron_arguments,
    megatron_flags,
    settings_without_flag,
)
from megatron_cpt.config.megatron.rows import ROWS
from megatron_cpt.config.settings.fields import setting_keys
from megatron_cpt.config.settings.schema import ModelConfig, ParallelConfig, RunConfig, ScheduleConfig, TrainingConfig
from megatron_cpt.config.settings.values import Duration

DENSE = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=1000)
MOE = replace(DENSE, num_moe_experts=8, moe_ffn_hidden_size=32, moe_num_dense_layers=1, moe_aux_loss_coeff=1e-3)
MLA = replace(
    MOE,
    multi_latent_attention=True,
    moe_aux_loss_coeff=0.0,
    moe_router_score_function="sigmoid",
    moe_router_pre_softmax=True,
    moe_router_enable_expert_bias=True,
)
YARN = replace(MLA, rope_scaling_type="yarn", rope_scaling_factor=40.0, rope_original_max_position_embeddings=2048)


def run_config(model: ModelConfig = DENSE, **sections: object) -> RunConfig:
    training = TrainingConfig(seq_length=32, global_batch_size=8, train_iters=100)
    return RunConfig(task="t", params="p", size="s", model=model, **{"training": training, **sections})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def accepted() -> dict[str, set[str]]:
    """Return the argument names that each Megatron-Core object takes."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    kinds = (
        TransformerConfig,
        MLATransformerConfig,
        OptimizerConfig,
        DistributedDataParallelConfig,
        GPTDatasetConfig,
    )
    names = {kind.__name__: {field.name for field in dataclasses.fields(kind)} for kind in kinds}
    return names | {"GPTModel": set(inspect.signature(GPTModel.__init__).parameters)}


def test_every_setting_has_exactly_one_row() -> None:
    keys = [row.setting for row in ROWS]
    assert sorted(keys) == sorted(setting_keys())
    assert len(keys) == len(set(keys))


def test_a_row_names_an_argument_or_who_honours_the_setting() -> None:
    for row in ROWS:
        assert row.arguments or row.honoured_by, row.setting


def test_the_file_that_is_said_to_honour_a_setting_names_it() -> None:
    package = Path(__file__).resolve().parents[2] / "megatron_cpt"
    for row in ROWS:
        if row.honoured_by:
            path = package / re.split("[, ;]", row.honoured_by)[0]
            name = row.setting.rpartition(".")[2]
            assert re.search(rf"\b{name}\b", path.read_text()), f"{row.setting}: not in {path}"


def test_no_flag_stands_in_two_rows() -> None:
    flags = [row.flag for row in ROWS if row.flag]
    assert len(flags) == len(set(flags))


def test_every_argument_of_the_table_exists_in_the_installed_megatron_core(accepted: dict[str, set[str]]) -> None:
    assert set(accepted) == set(TARGETS) == set(CONSTANTS)
    for row in ROWS:
        for name in row.arguments:
            target, _, argument = name.partition(".")
            assert argument in accepted[target], f"{row.setting} -> {name}"
    for target, constants in CONSTANTS.items():
        assert set(constants) <= accepted[target]
    assert set(MOE_CONSTANTS) <= accepted["TransformerConfig"]


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_megatron_core_accepts_the_arguments_of_a_transformer(model: ModelConfig) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    built = TransformerConfig(**megatron_arguments(run_config(model), "TransformerConfig"))
    assert (built.num_layers, built.hidden_size, built.kv_channels, built.num_query_groups) == (4, 64, 16, 4)
    assert built.normalization == "RMSNorm" and built.gated_linear_unit and not built.add_bias_linear
    assert built.hidden_dropout == built.attention_dropout == 0.0


@pytest.mark.parametrize(("model", "kind", "factor"), [(MLA, "rope", 1.0), (YARN, "yarn", 40.0)])
def test_megatron_core_accepts_the_arguments_of_latent_attention(model: ModelConfig, kind: str, factor: float) -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    built = MLATransformerConfig(**megatron_arguments(run_config(model), "MLATransformerConfig"))
    assert built.multi_latent_attention and built.rope_type == kind and built.rotary_scaling_factor == factor
    assert built.moe_layer_freq == [0, 1, 1, 1] and built.moe_router_load_balancing_type == "none"
    assert built.q_lora_rank is None
    if kind == "yarn":
        assert built.original_max_position_embeddings == 2048


def test_the_padded_vocabulary_and_tying_reach_the_model() -> None:
    arguments = megatron_arguments(run_config(), "GPTModel")
    assert arguments["vocab_size"] == 1024 and not arguments["share_embeddings_and_output_weights"]
    tied = megatron_arguments(run_config(replace(DENSE, untie_embeddings_and_output_weights=False)), "GPTModel")
    assert tied["share_embeddings_and_output_weights"] is True


def test_bf16_reduces_gradients_in_fp32() -> None:
    for precision, is_bf16 in (("bf16", True), ("fp32", False)):
        config = run_config(training=TrainingConfig(train_iters=1, precision=precision))  # type: ignore[arg-type]
        assert megatron_arguments(config, "DistributedDataParallelConfig")["grad_reduce_in_fp32"] is is_bf16
        assert megatron_arguments(config, "OptimizerConfig")["bf16"] is is_bf16


def test_recompute_settings_are_given_only_where_they_apply() -> None:
    def arguments(granularity: str) -> dict[str, object]:
        parallel = ParallelConfig(recompute_granularity=granularity)  # type: ignore[arg-type]
        return megatron_arguments(run_config(parallel=parallel), "TransformerConfig")

    assert arguments("none")["recompute_granularity"] is None
    assert "recompute_method" not in arguments("selective")
    assert arguments("full")["recompute_method"] == "uniform" and arguments("full")["recompute_num_layers"] == 1


def test_a_sliding_window_of_w_tokens_sees_w_minus_1_to_the_left() -> None:
    arguments = megatron_arguments(run_config(replace(DENSE, window_size=8)), "TransformerConfig")
    assert arguments["window_size"] == (7, 0)


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="BertModel: no such target; known: TransformerConfig"):
        megatron_arguments(run_config(), "BertModel")


def flag_values(config: RunConfig) -> dict[str, str]:
    flags = megatron_flags(config)
    values = {}
    for index, item in enumerate(flags):
        if item.startswith("--"):
            follows = flags[index + 1] if index + 1 < len(flags) else "--"
            values[item] = "" if follows.startswith("--") else follows
    return values


def test_flags_describe_the_model_the_length_and_the_schedule() -> None:
    schedule = ScheduleConfig(
        lr_decay_style="WSD", lr_warmup=Duration(10, "iterations"), lr_cooldown=Duration(0.2, "fraction")
    )
    flags = flag_values(run_config(schedule=schedule))
    assert flags["--num-layers"] == "4" and flags["--train-samples"] == "800" and flags["--lr"] == "0.0003"
    assert flags["--lr-decay-style"] == "WSD" and flags["--lr-warmup-samples"] == "80"
    assert flags["--lr-wsd-decay-samples"] == "160" and flags["--vocab-size"] == "1000"
    assert flags["--swiglu"] == "" and "--group-query-attention" not in flags and flags["--split"] == "100,0,0"


def test_flags_of_a_constant_rate_with_cooldown_are_those_of_wsd() -> None:
    constant = ScheduleConfig(lr_decay_style="constant")
    assert flag_values(run_config(schedule=constant))["--lr-decay-style"] == "constant"
    cooled = replace(constant, lr_cooldown=Duration(8, "samples"))
    assert flag_values(run_config(schedule=cooled))["--lr-decay-style"] == "WSD"


def test_what_megatron_lm_cannot_express_is_named() -> None:
    schedule = ScheduleConfig(lr_decay_style="infinite-cosine", lr_hold=1e-5, lr_hold_start=Duration(0.5, "fraction"))
    found = settings_without_flag(run_config(schedule=schedule))
    assert found == ["schedule.lr_decay_style", "schedule.lr_hold", "schedule.lr_hold_start"]
    assert settings_without_flag(run_config()) == []
    assert "model.rope_beta_fast" in settings_without_flag(run_config(YARN))
    assert flag_values(run_config(YARN))["--rotary-scaling-factor"] == "40"


def test_a_pattern_of_layers_is_one_word_without_blanks_as_megatrons_parser_takes_it() -> None:
    flags = megatron_flags(run_config(MLA))
    assert flags[flags.index("--moe-layer-freq") + 1] == "[0,1,1,1]"
    assert not any(" " in flag for flag in flags)
