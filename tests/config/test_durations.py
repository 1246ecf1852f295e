"""A stage of 1,024,000 tokens, 16,000 samples and 1,000 iterations: every form of a duration means the same everywhere."""

import pytest

from megatron_cpt.train.stage.schedule import schedule

HALF = (500, "500 steps", "8000 samples", "512K", "512_000 tokens", 0.5)
TENTH = (100, "100 iter", "1600 samples", "102.4K", "102_400 tokens", 0.1)
FIFTH = (200, "200 iterations", "3.2K samples", "204.8K", "204_800 tokens", 0.2)
HOLD = "schedule.lr_hold=1e-4"
RISING = ("optimizer.weight_decay_incr_style=cosine", "optimizer.weight_decay_end=0.3")


def curve(tree, *overrides: str) -> list[tuple[float, float]]:
    run = schedule(tree.load("training.train_tokens=1_024_000", *overrides).config)
    return [(run.learning_rate(samples), run.weight_decay(samples)) for samples in range(0, 16_000, 37)]


@pytest.mark.parametrize(
    ("setting", "forms", "more"),
    [
        ("schedule.lr_warmup", TENTH, ("schedule.lr_decay_style=cosine",)),
        ("schedule.lr_cooldown", FIFTH, ("schedule.lr_decay_style=WSD", "schedule.lr_cooldown_style=minus_sqrt")),
        ("schedule.lr_cooldown", FIFTH, ("schedule.lr_decay_style=constant",)),
        ("schedule.lr_decay", HALF, ("schedule.lr_decay_style=linear",)),
        ("schedule.lr_hold_start", HALF, ("schedule.lr_decay_style=infinite-cosine", HOLD)),
        ("schedule.lr_hold_start", HALF, ("schedule.lr_decay_style=infinite-inverse-square-root", HOLD)),
        ("optimizer.weight_decay_incr", HALF, RISING),
    ],
)
def test_every_form_gives_the_same_curve(tree, setting, forms, more):
    first, *others = (curve(tree, f"{setting}={form}", *more) for form in forms)
    assert len(set(first)) > 10
    assert all(other == first for other in others)
    assert curve(tree, f"{setting}={forms[-1] * 1.5}", *more) != first


def test_a_cooldown_in_a_ramp_counts_the_stages_last_steps(tree):
    """Iterations of a warm-up are the stage's first, small ones; those of a cooldown its last, whole ones."""
    ramp = ("training.rampup_batch_size=[[4, 10], [8, 20]]", "training.train_iters=100", "schedule.lr_decay_style=WSD")
    run = schedule(tree.load(*ramp, "schedule.lr_warmup=15", "schedule.lr_cooldown=5", size="short").config)
    assert (run.warmup, run.cooldown, run.total) == (10 * 4 + 5 * 8, 5 * 16, 10 * 4 + 10 * 8 + 80 * 16)
