"""Loss spikes: detected by comparison with recent losses, explained by the step's samples, and undone by a roll-back.

A loss is a spike when it exceeds the median of the last 16 by more than `training.spike_threshold` robust standard
deviations of the noise: 1.4826 / sqrt(2) x the median absolute deviation of the differences between neighbours among
the last 128 (for independent normal noise: its standard deviation, independent of the trend), at least 0.1 % of the
median, so that small changes of a flat loss are not spikes. Nothing is judged before 16 losses are known. Every loss
enters the window, so a lasting change of level stops being a spike after 8 steps.

A roll-back goes to the last checkpoint and skips the spike's iteration and those just before it, whose updates can have
raised the loss. Source: PaLM, arXiv:2204.02311, section 5.1 (restart before the spike, skip the batches before and
during).
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_cpt.config.settings.iteration_ranges import ranges_text
from megatron_cpt.config.settings.schema import TrainingConfig

WINDOW = 128
RECENT = 16
LEAST_DEVIATION = 1e-3
"""Smallest standard deviation as a fraction of the median."""


@dataclass(frozen=True)
class Spike:
    """A loss far above those before."""

    loss: float
    median: float
    deviation: float
    """Robust standard deviation of the losses' noise."""


class SpikeDetector:
    """Remembers the last losses; a threshold of 0 turns it off."""

    def __init__(self, threshold: float, losses: Sequence[float] = ()):
        self.threshold = threshold
        self._losses = deque(losses, maxlen=WINDOW)

    @property
    def losses(self) -> list[float]:
        """The window, kept in checkpoints so that a resumed run judges as an uninterrupted one."""
        return list(self._losses)

    def see(self, loss: float) -> Spike | None:
        """Take a step's finite loss; return it as a spike when it is one."""
        if not self.threshold:
            return None
        spike = None
        if len(self._losses) >= RECENT:
            known = list(self._losses)
            median = statistics.median(known[-RECENT:])
            changes = [later - earlier for earlier, later in pairwise(known)]
            middle = statistics.median(changes)
            spread = statistics.median(abs(change - middle) for change in changes)
            deviation = max(1.4826 / math.sqrt(2) * spread, LEAST_DEVIATION * abs(median))
            if loss > median + self.threshold * deviation:
                spike = Spike(loss, median, deviation)
        self._losses.append(loss)
        return spike


def skip_line(spike: Spike, iteration: int, checkpoint_iteration: int, training: TrainingConfig) -> str:
    """Return the line of `skip_iterations.txt` that skips a spike at `iteration`, of those after the checkpoint's."""
    first = max(iteration - training.spike_skip_iterations + 1, checkpoint_iteration + 1)
    (text,) = ranges_text([(first, iteration)])
    return f"{text}  # spike at iteration {iteration}: loss {spike.loss:.4f}, median {spike.median:.4f}\n"


def num_rollbacks(text: str) -> int:
    """Return how many lines of `skip_iterations.txt` roll-backs have written."""
    return sum("# spike at" in line for line in text.splitlines())


def may_roll_back(training: TrainingConfig, text: str) -> bool:
    """Return whether a run whose `skip_iterations.txt` contains `text` can roll back once more."""
    return training.spike_action == "rollback" and num_rollbacks(text) < training.spike_max_rollbacks
