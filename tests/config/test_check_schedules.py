"""Batch ramp-ups, weight-decay schedules, skipped iterations and spike settings that cannot work are refused."""

import pytest

RAMP = "training.global_batch_size=64 training.rampup_batch_size="
IMPOSSIBLE = {
    "two numbers": (RAMP + "[16,16]", "training.rampup_batch_size: [16, 16] has 2 numbers. Write [16, 16, '1M samples']"),
    "no length": (RAMP + "[16,16,soon]", "'soon' is not a duration"),
    "a length of nothing": (RAMP + "[16,16,0.0]", "Three numbers above 0 are needed"),
    "pairs and numbers": (RAMP + "[[16,1B],16]", "is no batch ramp-up"),
    "a step without its end": (RAMP + "[[16,1B],[32]]", "is no batch ramp-up"),
    "steps that fall": (RAMP + "[[32,2],[16,4]]", "32 is not below 16. Let the batches rise."),
    "a last step that is the whole batch": (RAMP + "[[16,2],[64,4]]", "64 is not below 64"),
    "a step that is over before it begins": (
        RAMP + "[[16,4],[32,2]]", "has the batch 32 until 2 iterations, which is over before it begins",
    ),
    "a step of nothing": (RAMP + "[[16,0]]", "has the batch 16 until 0 iterations"),
    "a step that the ranks cannot share": (
        RAMP + "[[12,4]] launch.gpus_per_node=4", "training.rampup_batch_size has the batch 12, not a multiple of",
    ),
    "a decay that ends in the warm-up": (
        "schedule.lr_warmup=4 schedule.lr_decay=4", "schedule.lr_decay is 4 iterations (64 samples), not after the warm-up's end",
    ),
    "a decay without one": ("schedule.lr_decay_style=WSD schedule.lr_decay=0.5", "lr_decay is 0.5 and has no effect"),
    "a geometric way to nothing": (
        "schedule.lr_decay_style=WSD schedule.lr_cooldown=0.5 schedule.lr_cooldown_style=geometric", "Set min_lr above 0",
    ),
    "a warm-up that falls": ("schedule.lr_warmup=2 schedule.lr_warmup_init=1e-3", "lr_warmup_init is 0.001, more than optimizer.lr"),
    "an inverse square root of nothing": ("schedule.lr_decay_style=inverse-square-root", "Set a warm-up."),
    "weight decay's time without a style": ("optimizer.weight_decay_incr=0.5", "weight_decay_incr is 0.5 and has no effect"),
    "weight decay's time of nothing": (
        "optimizer.weight_decay_incr=0 optimizer.weight_decay_end=0.2 optimizer.weight_decay_incr_style=linear",
        "would have no time to change",
    ),
    "a zero": (RAMP + "[16,0,100]", "Three numbers above 0 are needed"),
    "no list": (RAMP + "16", "16 is no batch ramp-up"),
    "a start above the batch": (RAMP + "[64,16,100]", "starts at 64, not below global_batch_size (64)"),
    "an increment that misses": (RAMP + "[16,20,100]", "64 - 16 = 48 is no multiple of 20"),
    "a start that the ranks cannot share": (
        RAMP + "[6,2,100] launch.gpus_per_node=4",
        "training.rampup_batch_size starts at 6, not a multiple of micro_batch_size x data-parallel size (2 x 4 = 8)",
    ),
    "an increment that the ranks cannot share": (
        RAMP + "[4,2,100] launch.gpus_per_node=4",
        "training.rampup_batch_size grows by 2, not a multiple",
    ),
    "a ramp that interleaving cannot use": (
        "training.global_batch_size=8 training.rampup_batch_size=[1,1,100] launch.gpus_per_node=2 "
        "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2",
        "training.rampup_batch_size starts at 1, not a multiple of",
    ),
    "weight decay without a style": ("optimizer.weight_decay_end=0.2", "has no effect with weight_decay_incr_style constant"),
    "a style without bounds": ("optimizer.weight_decay_incr_style=linear", "without weight_decay_start or weight_decay_end"),
    "negative weight decay": (
        "optimizer.weight_decay_incr_style=linear optimizer.weight_decay_end=-1",
        "optimizer.weight_decay_end is -1.0. 0 or more is needed.",
    ),
    "muon with sharded state": ("optimizer.name=muon", "Muon needs whole matrices on a rank"),
    "a momentum without muon": ("optimizer.muon_momentum=0.9", "has no effect with optimizer.name adam"),
    "a range backwards": ('data.skip_iterations=["9-3"]', "'9-3' is no range of iterations"),
    "a roll-back without a threshold": ("training.spike_action=rollback", "Set spike_threshold."),
    "no iteration to skip": ("training.spike_skip_iterations=0", "More than 0 is needed"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_work_is_refused_with_its_numbers(refused, case):
    overrides, message = IMPOSSIBLE[case]
    assert message in refused(*overrides.split())


@pytest.mark.parametrize("tokens", ["1M", "999_999", "1_000_001", "65"])
@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.35, 0.9])
def test_fractions_that_sum_to_one_meet(tree, tokens, warmup):
    """Whatever the stage's length, a warm-up and a cooldown that make up the whole stage touch and do not overlap."""
    rest = round(1 - warmup, 2)
    training = f"training.train_tokens={tokens}"
    tree.load(training, "schedule.lr_decay_style=WSD", f"schedule.lr_warmup={warmup}", f"schedule.lr_cooldown={rest}")
    tree.load(
        training, "schedule.lr_decay_style=infinite-cosine", "schedule.lr_hold=1e-4", f"schedule.lr_hold_start={warmup}",
        f"schedule.lr_cooldown={rest}",
    )  # fmt: skip
