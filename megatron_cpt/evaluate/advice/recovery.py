"""Is a stage recovering from the change of its data? Pure functions on the records of metrics.jsonl.

The training loss is compared with where the stage before was heading: a straight line through the last `TREND_FRACTION`
of its smoothed losses, carried on flat or falling (a rising line is held at its end). The held-out loss of an old corpus
is compared with its value before the first step. Within `TOLERANCE` of these counts as recovered. A loss that is not
there yet is recovering while it still falls: from the second to the last quarter of the stage, by `TOLERANCE` or more.
Only records after the warm-up are judged, because a rising learning rate raises the loss by itself.

Source: the questions are those of AuroraGPT's CPT cookbook ("if the loss is not recovering ..."); it leaves open how
recovery is measured, so window and thresholds are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from megatron_cpt.evaluate.report.stages import smoothed

TOLERANCE = 0.02
"""Relative distance from the expected value that counts as recovered."""
TREND_FRACTION = 0.25
"""Last part of the stage before, through which its trend is laid."""
MIN_RECORDS = 16
"""Training records after the warm-up that a judgement needs; also of the stage before for its trend."""
MIN_VALIDATIONS = 3
"""Held-out measurements of a corpus, the one before the first step included."""

Verdict = Literal["recovered", "recovering", "stuck", "rising", "unknown"]
Points = Sequence[tuple[float, float]]
"""(tokens consumed, loss), in order."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """A judgement of one curve, with the numbers it rests on."""

    verdict: Verdict
    reference: float
    """Value to which the curve is expected to return."""
    peak: float
    """Highest value since the change."""
    now: float
    """Last value: of the training loss, smoothed."""
    change: float
    """Relative change from the second quarter of the stage to the last one; below zero: falling."""
    note: str = ""
    """Why the verdict is unknown."""

    @property
    def distance(self) -> float:
        """How far the curve is above its reference, as a fraction of it."""
        return self.now / self.reference - 1


def window_of(count: int) -> int:
    """Return the records that one smoothed value spans: a twentieth of the curve, at least 5."""
    return max(5, count // 20)


def trend(before: Points) -> tuple[float, float]:
    """Return the level at the end of a curve and its slope per token, at most 0, from the last part of it."""
    values = smoothed([value for _, value in before], window_of(len(before)))
    last = max(int(len(values) * TREND_FRACTION), min(len(values), 4))
    xs, ys = [tokens for tokens, _ in before[-last:]], values[-last:]
    mean_x, mean_y = fmean(xs), fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    slope = min(slope, 0.0)
    return mean_y + slope * (xs[-1] - mean_x), slope


def training_recovery(before: Points, after: Points, tolerance: float = TOLERANCE) -> Recovery:
    """Judge the training loss `after` the change by where it was heading `before` it.

    Tokens of `after` count from the change; those of `before` from that stage's own start. The trend is carried on for as
    many tokens as it was laid through, then held: a line drawn further would promise what no model keeps.
    """
    if len(after) < MIN_RECORDS:
        return _unknown(f"{len(after)} training records after the warm-up, {MIN_RECORDS} are needed")
    if len(before) < MIN_RECORDS:
        return _unknown(f"{len(before)} training records of the stage before, {MIN_RECORDS} are needed")
    level, slope = trend(before)
    reach = (before[-1][0] - before[0][0]) * TREND_FRACTION
    reference = level + slope * min(after[-1][0], reach)
    values = smoothed([value for _, value in after], window_of(len(after)))
    tail = fmean(value for _, value in after[-window_of(len(after)) :])
    return _judged(values, reference, tail, tolerance)


def heldout_recovery(values: Sequence[float], tolerance: float = TOLERANCE) -> Recovery:
    """Judge held-out losses of an old corpus; the first one was measured before the first step."""
    if len(values) < MIN_VALIDATIONS:
        return _unknown(f"{len(values)} held-out measurements, {MIN_VALIDATIONS} are needed")
    return _judged(values[1:], values[0], values[-1], tolerance)


def _judged(values: Sequence[float], reference: float, now: float, tolerance: float) -> Recovery:
    quarter = max(len(values) // 4, 1)
    early = fmean(values[quarter : 2 * quarter]) if len(values) >= 4 else values[0]
    change = fmean(values[-quarter:]) / early - 1
    verdict: Verdict = "stuck"
    if now <= reference * (1 + tolerance):
        verdict = "recovered"
    elif change >= tolerance:
        verdict = "rising"
    elif change <= -tolerance:
        verdict = "recovering"
    return Recovery(verdict=verdict, reference=reference, peak=max(values), now=now, change=change)


def _unknown(note: str) -> Recovery:
    nan = float("nan")
    return Recovery(verdict="unknown", reference=nan, peak=nan, now=nan, change=nan, note=note)
