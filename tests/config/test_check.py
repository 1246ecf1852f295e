"""Every relation that cannot work is refused with both numbers; what works is let through."""

from collections.abc import Callable

import pytest

from megatron_cpt.config.checks.all import check_config
from megatron_cpt.errors import ConfigError

Refused = Callable[..., str]

# One change of a configuration that works (TP1, PP1, one rank), and a part of the message it must bring.
IMPOSSIBLE = {
    "heads by TP": (
        "parallel.tensor_model_parallel_size=3 launch.gpus_per_node=3",
        "model.num_attention_heads is 8, not a multiple of tensor_model_parallel_size (3)",
    ),
    "query groups by TP": (
        "parallel.tensor_model_parallel_size=8 launch.gpus_per_node=8",
        "model.num_query_groups is 4, not a multiple of tensor_model_parallel_size (8)",
    ),
    "heads by query groups": (
        "model.num_query_groups=3",
        "model.num_attention_heads is 8, not a multiple of num_query_groups (3)",
    ),
    "hidden size by heads": (
        "model.hidden_size=60",
        "model.hidden_size is 60, not a multiple of num_attention_heads (8)",
    ),
    "odd head size": ("model.kv_channels=7", "model.kv_channels is 7. Rotary embedding turns pairs"),
    "ffn by TP": (
        "parallel.tensor_model_parallel_size=4 launch.gpus_per_node=4 model.ffn_hidden_size=130",
        "model.ffn_hidden_size is 130, not a multiple of tensor_model_parallel_size (4)",
    ),
    "vocabulary by TP": (
        "parallel.tensor_model_parallel_size=4 launch.gpus_per_node=4 model.make_vocab_size_divisible_by=5 "
        "model.vocab_size=1005",
        "the padded vocabulary has 1005 rows, not a multiple of tensor_model_parallel_size (4)",
    ),
    "layers by PP": (
        "parallel.pipeline_model_parallel_size=3 launch.gpus_per_node=3",
        "model.num_layers is 4, not a multiple of pipeline_model_parallel_size (3)",
    ),
    "layers by PP x VPP": (
        "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=4 launch.gpus_per_node=2",
        "model.num_layers is 4, not a multiple of pipeline_model_parallel_size x virtual size (8)",
    ),
    "VPP without PP": (
        "parallel.virtual_pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size is 2 with pipeline_model_parallel_size 1",
    ),
    "micro-batches by PP under VPP": (
        "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2 launch.gpus_per_node=2 "
        "training.global_batch_size=6",
        "is 2 with 3 micro-batches, not a multiple of pipeline_model_parallel_size (2)",
    ),
    "uneven split that leaves layers over": (
        "parallel.pipeline_model_parallel_size=2 launch.gpus_per_node=2 "
        "parallel.num_layers_in_first_pipeline_stage=1 parallel.num_layers_in_last_pipeline_stage=2",
        "the uneven split gives 1 + 2 of 4 layers to 2 of 2 pipeline stages",
    ),
    "uneven split with uneven middle": (
        "parallel.pipeline_model_parallel_size=3 launch.gpus_per_node=3 parallel.num_layers_in_first_pipeline_stage=1",
        "the uneven split leaves 3 of 4 layers (1 in the uneven stages) for 2 stages",
    ),
    "compiled layers with dropout": (
        "training.compile=true model.hidden_dropout=0.1",
        "training.compile is true with model.hidden_dropout 0.1",
    ),
    "SP without TP": ("parallel.sequence_parallel=true", "It needs TP > 1"),
    "sequence by CP": (
        "parallel.context_parallel_size=3 launch.gpus_per_node=3",
        "training.seq_length is 64, not a multiple of 2 x context_parallel_size (6). Use 60 or 66.",
    ),
    "sequence by CP and TP": (
        "parallel.context_parallel_size=4 parallel.tensor_model_parallel_size=4 parallel.sequence_parallel=true "
        "launch.gpus_per_node=16 training.seq_length=48",
        "not a multiple of 2 x context_parallel_size (8) x tensor_model_parallel_size (4) = 32. Use 32 or 64.",
    ),
    "world by layout": (
        "parallel.tensor_model_parallel_size=2 launch.gpus_per_node=3",
        "1 x 3 = 3, not a multiple of TP x PP x CP (2 x 1 x 1 = 2). Use 2 or 4 ranks",
    ),
    "batch by data parallelism": (
        "launch.nodes=4 launch.gpus_per_node=4 training.global_batch_size=100",
        "training.global_batch_size is 100, not a multiple of micro_batch_size x data-parallel size (2 x 16 = 32). "
        "Use 96 or 128.",
    ),
    "batch below data parallelism": (
        "launch.nodes=4 launch.gpus_per_node=4",
        "training.global_batch_size is 16, not a multiple of micro_batch_size x data-parallel size (2 x 16 = 32). Use 32.",
    ),
    "EP without experts": ("parallel.expert_model_parallel_size=2", "is 2 without num_moe_experts"),
    "ETP without experts": ("parallel.expert_tensor_parallel_size=2", "is 2 without num_moe_experts"),
    "overlap of gathers alone": ("parallel.overlap_param_gather=true", "is true without overlap_grad_reduce"),
    "overlap without distributed optimizer": (
        "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true parallel.use_distributed_optimizer=false",
        "is true without use_distributed_optimizer",
    ),
    "recompute layers without full recompute": (
        "parallel.recompute_num_layers=2",
        "parallel.recompute_num_layers is 2 and has no effect with recompute_granularity none",
    ),
    "sequence beyond positions": (
        "training.seq_length=8192",
        "training.seq_length is 8192, longer than model.max_position_embeddings (4096)",
    ),
    "no length": ("training.train_tokens=null", "the stage has no length. Exactly one of"),
    "schedule longer than the stage": (
        "training.train_iters=10 schedule.lr_decay_style=WSD schedule.lr_warmup=6 schedule.lr_cooldown=0.5",
        "schedule.lr_warmup + lr_cooldown is 96 + 80 = 176 samples, longer than the stage (160 samples)",
    ),
    "cooldown of cosine": (
        "schedule.lr_decay_style=cosine schedule.lr_cooldown=0.1",
        "schedule.lr_cooldown is 0.1 with lr_decay_style cosine, which decays over the whole stage",
    ),
    "warm-up start without warm-up": (
        "schedule.lr_warmup_init=1e-5",
        "schedule.lr_warmup_init is 1e-05 without a warm-up",
    ),
    "infinite without hold": ("schedule.lr_decay_style=infinite-cosine", "schedule.lr_hold is missing"),
    "hold of a finite schedule": ("schedule.lr_hold=1e-5", "schedule.lr_hold is 1e-05 and has no effect"),
    "hold above the peak": (
        "schedule.lr_decay_style=infinite-cosine schedule.lr_hold=1 schedule.lr_hold_start=0.5",
        "schedule.lr_hold is 1. It must lie between optimizer.min_lr (0) and optimizer.lr (0.0003)",
    ),
    "hold after the cooldown's start": (
        "training.train_iters=10 schedule.lr_decay_style=infinite-cosine schedule.lr_hold=1e-5 schedule.lr_hold_start=0.9 "
        "schedule.lr_cooldown=0.2",
        "is at sample 144. It must lie between the warm-up's end (0) and the cooldown's start (128)",
    ),
    "min_lr above lr": ("optimizer.min_lr=1", "optimizer.min_lr is 1, more than optimizer.lr (0.0003)"),
    "mix that is no whole": ("data.mix.D0=0.5", "data.mix sums to 1.25 (0.5 + 0.75), not to 1"),
    "mix of an unknown corpus": (
        "data.mix={D2: 1.0}",
        "data.mix names D2, which is no corpus of data.corpora. Known: D0, D1.",
    ),
    "negative share": ("data.mix={D0: -0.5, D1: 1.5}", "data.mix.D0 is -0.5. A share lies between 0 and 1."),
    "mix and list": ("data.train_data_path=list.sh", "data.mix and data.train_data_path are given"),
    "mix and rules": ("data.rules={D0: share 1}", "data.mix and data.rules are given"),
    "no rule": ('data.mix=null data.rules={D0: "2"}', "data.rules.D0: '2' is no rule. Write `share NUMBER`"),
    "base pool alone": ("data.mix=null data.rules={D0: ratio 1} data.base_pool=D0", "data.base_pool is given alone"),
    "cap without rules": ("data.cap_epochs=2", "data.cap_epochs is 2.0 and has no effect without data.rules"),
    "neither mix nor list": ("data.mix=null", "none of data.mix, data.rules and data.train_data_path is given"),
    "evaluation without data": (
        "evaluation.eval_interval=5 data.corpora.D0.validation=[] data.corpora.D1.validation=[]",
        "evaluation.eval_interval is 5 and no corpus has validation",
    ),
    "optimizer state of nothing": ("init.load=full", "init.load is full without init.from_path"),
    "itself as start": ("init.from_path=variant:main", "init.from_path is variant:main, the run itself"),
    "keep_every alone": ("checkpoint.keep_every=10", "checkpoint.keep_every is 10 without keep_last"),
    "exit before the start": (
        "launch.walltime=60 launch.exit_before_walltime=60",
        "is 60 s, not less than launch.walltime",
    ),
    "zero": ("training.micro_batch_size=0", "training.micro_batch_size is 0. More than 0 is needed."),
    "negative": ("optimizer.weight_decay=-0.1", "optimizer.weight_decay is -0.1. 0 or more is needed."),
    "percent": ("model.hidden_dropout=10", "model.hidden_dropout is 10.0. 0 or more and less than 1 is needed."),
    "temperature of yarn without latent attention": (
        "model.rope_scaling_type=yarn model.rope_mscale=0.7",
        "model.rope_mscale is 0.7 and has no effect with rope_scaling_type yarn",
    ),
    "rope factor of no scaling": (
        "model.rope_scaling_factor=8",
        "is 8.0 and has no effect with rope_scaling_type none",
    ),
    "llama3 factors": (
        "model.rope_scaling_type=llama3 model.rope_low_freq_factor=5",
        "model.rope_low_freq_factor is 5, not below rope_high_freq_factor (4)",
    ),
    "expert settings of a dense model": (
        "model.moe_ffn_hidden_size=32",
        "is 32 and has no effect without num_moe_experts",
    ),
    "latent settings of plain attention": (
        "model.q_lora_rank=8",
        "is 8 and has no effect without multi_latent_attention",
    ),
}
MOE = "model.num_moe_experts=8 model.moe_ffn_hidden_size=32"
IMPOSSIBLE_WITH_EXPERTS = {
    "no width": ("model.moe_ffn_hidden_size=null", "model.num_moe_experts is 8 without moe_ffn_hidden_size"),
    "topk": ("model.moe_router_topk=9", "model.moe_router_topk is 9, more than num_moe_experts (8)"),
    "top 1 of a softmax": ("model.moe_router_topk=1", "the softmax over one expert has no gradient"),
    "all layers dense": ("model.moe_num_dense_layers=4", "is 4, not below num_layers (4)"),
    "bias on softmax": ("model.moe_router_enable_expert_bias=true", "The bias needs sigmoid scores"),
    "bias rate without bias": (
        "model.moe_router_bias_update_rate=0.1",
        "has no effect without moe_router_enable_expert_bias",
    ),
    "half a group": ("model.moe_router_num_groups=2", "Group-limited routing needs both"),
    "groups": (
        "model.moe_router_num_groups=3 model.moe_router_group_topk=2",
        "model.num_moe_experts is 8, not a multiple of moe_router_num_groups (3)",
    ),
    "more groups than there are": (
        "model.moe_router_num_groups=2 model.moe_router_group_topk=3",
        "model.moe_router_group_topk is 3, more than moe_router_num_groups (2)",
    ),
    "more groups than experts of a token": (
        "model.moe_router_num_groups=4 model.moe_router_group_topk=4 model.moe_router_topk=2",
        "model.moe_router_topk is 2 with moe_router_group_topk 4",
    ),
    "more experts of a token than its groups have": (
        "model.moe_router_num_groups=8 model.moe_router_group_topk=1 model.moe_router_topk=2",
        "the chosen groups have 1 experts",
    ),
    "experts by EP": (
        "parallel.expert_model_parallel_size=3 launch.gpus_per_node=3",
        "model.num_moe_experts is 8, not a multiple of expert_model_parallel_size (3)",
    ),
    "EP beyond the ranks": (
        "parallel.expert_model_parallel_size=4 launch.gpus_per_node=2",
        "is 4 x 1 = 4, no divisor of the 2 ranks of a pipeline stage",
    ),
    "TP without SP": (
        "parallel.tensor_model_parallel_size=2 launch.gpus_per_node=2",
        "is false with experts and tensor_model_parallel_size 2",
    ),
    "ETP of its own without EP": (
        "parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true parallel.expert_tensor_parallel_size=1 "
        "launch.gpus_per_node=2",
        "is 1 and tensor_model_parallel_size is 2, with expert_model_parallel_size 1",
    ),
    "expert width by ETP": (
        "parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true launch.gpus_per_node=2 "
        "model.moe_ffn_hidden_size=33",
        "model.moe_ffn_hidden_size is 33, not a multiple of expert_tensor_parallel_size (2)",
    ),
}
MLA = "model.multi_latent_attention=true model.num_query_groups=null model.qk_layernorm=true"
IMPOSSIBLE_WITH_LATENT_ATTENTION = {
    "TP without SP": (
        "parallel.tensor_model_parallel_size=2 launch.gpus_per_node=2",
        "is false with multi_latent_attention and tensor_model_parallel_size 2",
    ),
    "query groups": ("model.num_query_groups=4", "which has no key/value heads"),
    "llama3 scaling": ("model.rope_scaling_type=llama3", "is llama3 with multi_latent_attention"),
    "window": ("model.window_size=8", "model.window_size is 8 and has no effect with multi_latent_attention"),
    "head dimension": ("model.kv_channels=16", "model.kv_channels is 16 and has no effect with multi_latent_attention"),
    "no norms": ("model.qk_layernorm=false", "Set model.qk_layernorm: true"),
    "yarn's betas": (
        "model.rope_scaling_type=yarn model.rope_beta_slow=40",
        "model.rope_beta_fast is 32, not above rope_beta_slow (40)",
    ),
}


def overrides(text: str) -> list[str]:
    """Split at blanks that a new `key=` follows."""
    words: list[str] = []
    for word in text.split(" "):
        if "=" in word or not words:
            words.append(word)
        else:
            words[-1] += " " + word
    return words


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_relation_is_refused_with_its_numbers(refused: Refused, name: str) -> None:
    text, expected = IMPOSSIBLE[name]
    message = refused(*overrides(text))
    mistakes = [line.strip() for line in message.splitlines() if not line.endswith("mistakes")]
    assert expected in message
    assert all(line.startswith(("command line: ", "task ja: ")) for line in mistakes)


@pytest.mark.parametrize("name", IMPOSSIBLE_WITH_EXPERTS)
def test_an_impossible_mixture_of_experts_is_refused(refused: Refused, name: str) -> None:
    text, expected = IMPOSSIBLE_WITH_EXPERTS[name]
    assert expected in refused(*overrides(MOE), *overrides(text))


@pytest.mark.parametrize("name", IMPOSSIBLE_WITH_LATENT_ATTENTION)
def test_an_impossible_latent_attention_is_refused(refused: Refused, name: str) -> None:
    text, expected = IMPOSSIBLE_WITH_LATENT_ATTENTION[name]
    assert expected in refused(*overrides(MLA), *overrides(text))


@pytest.mark.parametrize(
    "text",
    [
        "parallel.tensor_model_parallel_size=4 parallel.sequence_parallel=true launch.gpus_per_node=8",
        "parallel.pipeline_model_parallel_size=4 launch.gpus_per_node=4",
        "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2 launch.gpus_per_node=2",
        "parallel.pipeline_model_parallel_size=3 launch.gpus_per_node=3 "
        "parallel.num_layers_in_first_pipeline_stage=1 parallel.num_layers_in_last_pipeline_stage=1",
        "parallel.pipeline_model_parallel_size=2 launch.gpus_per_node=2 parallel.num_layers_in_first_pipeline_stage=1",
        "parallel.context_parallel_size=4 launch.gpus_per_node=8",
        MOE + " parallel.expert_model_parallel_size=4 launch.gpus_per_node=4",
        MOE + " parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true launch.gpus_per_node=4 "
        "parallel.expert_model_parallel_size=4 parallel.expert_tensor_parallel_size=1",
        MLA + " model.rope_scaling_type=yarn model.rope_scaling_factor=40",
        "schedule.lr_decay_style=infinite-cosine schedule.lr_hold=1e-4 schedule.lr_hold_start=0.3 schedule.lr_cooldown=0.1",
        "schedule.lr_decay_style=constant schedule.lr_cooldown=0.1 schedule.lr_warmup=0.01",
        "data.mix=null data.train_data_path=list.sh",
        "init.from_path=variant:base init.load=full",
        "evaluation.eval_interval=5",
        "data.mix={D0: 0.3333333333333333, D1: 0.6666666666666667}",
    ],
)
def test_what_works_is_let_through(tree, text: str) -> None:
    tree.load(*overrides(text))


def test_independent_problems_come_together(refused: Refused) -> None:
    message = refused(
        "parallel.tensor_model_parallel_size=3", "optimizer.min_lr=1", "data.mix.D0=0.5", "training.seed=x"
    )
    for part in (
        "training.seed",
        "num_attention_heads is 8",
        "optimizer.min_lr",
        "data.mix sums",
        "not a multiple of TP",
    ):
        assert part in message


def test_a_number_out_of_range_causes_no_second_complaint(refused: Refused) -> None:
    assert refused("parallel.tensor_model_parallel_size=0") == (
        "command line: parallel.tensor_model_parallel_size is 0. More than 0 is needed."
    )


def test_a_problem_points_at_the_layer_that_made_the_change(tree, refused: Refused) -> None:
    tree.write("site.yaml", "launch: {gpus_per_node: 3}")
    message = refused("parallel.pipeline_model_parallel_size=2", site="./site.yaml")
    assert message.startswith("command line: launch.nodes x launch.gpus_per_node is 1 x 3 = 3")
    text = (tree.root / "tasks/ja/task.yaml").read_text()
    tree.write("tasks/ja/task.yaml", text.replace("lr: 1e-4", "lr: 1e-4, min_lr: 1"))
    assert refused(variant="replay").startswith("tasks/ja/task.yaml (variants.replay): optimizer.min_lr is 1")


def test_check_config_raises_what_loading_raises(tree) -> None:
    from dataclasses import replace

    loaded = tree.load()
    check_config(loaded.config, loaded.origins)
    broken = replace(loaded.config, training=replace(loaded.config.training, train_iters=5))
    with pytest.raises(ConfigError, match="the stage has 2 lengths"):
        check_config(broken, loaded.origins)
