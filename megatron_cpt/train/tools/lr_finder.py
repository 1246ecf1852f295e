"""Learning-rate range test: one short training from the stage's start, its learning rate rising from step to step.

The rate rises exponentially from `lr_min` to `lr_max`; weight decay, clipping and batches are the stage's own. Nothing of it
is kept but `<run>/lr_find/`: `losses.csv` (iteration, lr, loss, smoothed), `losses.png` and `suggestion.json`. It ends early when the loss is not
finite or exceeds four times the lowest smoothed one.

The suggestion is the smaller of the rate at which the smoothed loss falls fastest per decade and a tenth of the rate at its
lowest point. Smoothing is an exponential mean (0.9) corrected for its start.

Source: Smith, arXiv:1506.01186, section 3.3 (range test: the rate where the loss begins to fall up to where it gets ragged);
the exponential sweep and the two readings are the fastai library's (`fastai/callback/schedule.py`, `steep`, `minimum`).
"""

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.config.checks.lr_find import check_range_test
from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.files import whole_file, write_json
from megatron_cpt.run.directory import run_dir
from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
from megatron_cpt.train.samples.batches import microbatches
from megatron_cpt.train.stage.setup import prepare
from megatron_cpt.train.stage.step import train_step
from megatron_cpt.train.watch.watchdog import Watchdog

logger = logging.getLogger(__name__)

SMOOTHING = 0.9
DIVERGED = 4.0


@dataclass(frozen=True)
class RangeTest:
    """Measurements of a range test."""

    rates: list[float]
    losses: list[float]
    folder: Path

    @property
    def smoothed(self) -> list[float]:
        """The losses as an exponential mean."""
        return smooth(self.losses)


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean of each loss and those before it, corrected for its start."""
    mean, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**count))
    return smoothed


def suggested_rate(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Return the rate of steepest descent and a tenth of the rate at the lowest point, by the smoothed losses.

    Raises: ValueError when the loss never falls.
    """
    smoothed = smooth(losses)
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    slopes = {
        n: (smoothed[n + 1] - smoothed[n - 1]) / math.log10(rates[n + 1] / rates[n - 1])
        for n in range(1, min(lowest + 1, len(rates) - 1))
    }
    if not slopes or min(slopes.values()) >= 0:
        raise ValueError("the loss never falls")
    return rates[min(slopes, key=slopes.__getitem__)], rates[lowest] / 10


def find_learning_rate(loaded: LoadedConfig, lr_min: float, lr_max: float, iterations: int) -> RangeTest:
    """Run the range test on every rank of this job; rank 0 writes what it measured.

    Raises: CptError for errors that a user can fix.
    """
    check_range_test(loaded.config.training, lr_min, lr_max, iterations)
    initialize_parallel(loaded.config)
    try:
        return _range_test(loaded, lr_min, lr_max, iterations)
    finally:
        finish_parallel()


def _range_test(loaded: LoadedConfig, lr_min: float, lr_max: float, iterations: int) -> RangeTest:
    config = loaded.config
    stage = prepare(loaded, from_start=True)
    assert stage is not None  # only a run's own checkpoint can say that it is finished
    rates: list[float] = []
    losses: list[float] = []
    lowest = math.inf
    watchdog = Watchdog(config.launch.hang_timeout)
    for iteration in range(iterations):
        watchdog.beat()
        rate = lr_min * (lr_max / lr_min) ** (iteration / (iterations - 1))
        batches = microbatches(
            stage.dataset, stage.sizes.samples(iteration), stage.sizes.size(iteration), config, stage.tokenizer.eod_id
        )
        result = train_step(stage.model, stage.optimizer, batches, config, rate)
        if not math.isfinite(result.loss):
            break
        rates.append(rate)
        losses.append(result.loss)
        smoothed = smooth(losses)[-1]
        lowest = min(lowest, smoothed)
        logger.info("iteration %d/%d | lr %.3e | loss %7.4f | smoothed %7.4f", iteration + 1, iterations, rate,
                    result.loss, smoothed)  # fmt: skip
        if smoothed > DIVERGED * lowest:
            break
    watchdog.stop()
    test = RangeTest(rates, losses, run_dir(config).path / "lr_find")
    if torch.distributed.get_rank() == 0:
        _write(test)
    return test


def _write(test: RangeTest) -> None:
    write_json(test.folder / "suggestion.json", _suggestion(test))
    with whole_file(test.folder / "losses.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "lr", "loss", "smoothed"])
        writer.writerows(
            (number, rate, loss, smoothed)
            for number, (rate, loss, smoothed) in enumerate(
                zip(test.rates, test.losses, test.smoothed, strict=True), start=1
            )
        )
    import matplotlib  # slow to import, and needed by one rank at the end

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(test.rates, test.losses, color="0.75", label="loss")
    axes.plot(test.rates, test.smoothed, label="smoothed")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss in nats per token")
    low, high = min(test.smoothed), max(test.smoothed[0], test.losses[0])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    for rate, name in zip(_marks(test), ("steepest", "a tenth of the lowest"), strict=False):
        axes.axvline(rate, linestyle="--", color="C1" if name == "steepest" else "C2", label=f"{name}: {rate:.2e}")
    axes.legend()
    with whole_file(test.folder / "losses.png", "wb") as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _suggestion(test: RangeTest) -> dict[str, Any]:
    values: dict[str, Any] = {"iterations": len(test.rates), "lowest_smoothed_loss": min(test.smoothed)}
    rates = _marks(test)
    if not rates:
        return values | {"suggested": None, "reason": "the loss never falls"}
    return values | {"suggested": min(rates), "steepest": rates[0], "tenth_of_lowest": rates[1]}


def _marks(test: RangeTest) -> tuple[float, ...]:
    try:
        return suggested_rate(test.rates, test.losses)
    except ValueError:
        return ()
