"""The logged steps of a stage as columns of numbers, and thinned for charts and judgements.

A record as a dictionary takes a kilobyte and a half; a million of them exceed the memory limit of a login node. As
columns they take 40 bytes each. A chart has some thousand points across and a judgement smooths over a twentieth of a
curve: of a stage with more than `MOST_STEPS` logged steps, equal numbers of neighbours become one record with the mean
of their losses.
"""

from array import array
from typing import Any

MOST_STEPS = 20_000
STEP_FIELDS = frozenset({"kind", "iteration", "consumed_tokens", "loss", "lr", "tokens_per_second"})
"""Kept fields of a step."""


class Steps:
    """Columns of the steps that count, in order of iteration."""

    def __init__(self) -> None:
        self._iteration, self._tokens = array("q"), array("q")
        self._loss, self._lr, self._speed = array("d"), array("d"), array("d")

    def add(self, record: dict[str, Any]) -> None:
        """Append a step's record with a finite loss."""
        self._iteration.append(record["iteration"])
        self._tokens.append(record["consumed_tokens"])
        self._loss.append(record["loss"])
        self._lr.append(record["lr"])
        self._speed.append(record.get("tokens_per_second") or 0.0)

    def cut(self, iteration: int) -> None:
        """Drop the steps after an iteration."""
        kept = len(self._iteration)
        while kept and self._iteration[kept - 1] > iteration:
            kept -= 1
        for column in (self._iteration, self._tokens, self._loss, self._lr, self._speed):
            del column[kept:]

    @property
    def tokens(self) -> int:
        """Tokens consumed at the last step."""
        return self._tokens[-1] if self._tokens else 0

    def records(self) -> list[dict[str, Any]]:
        """Return the steps as records, at most `MOST_STEPS`: the last of each group of neighbours, its loss their mean."""
        count = len(self._iteration)
        width = -(-count // MOST_STEPS) or 1
        found = []
        for start in range(0, count, width):
            stop = min(start + width, count)
            last = stop - 1
            record: dict[str, Any] = {
                "iteration": self._iteration[last],
                "consumed_tokens": self._tokens[last],
                "loss": sum(self._loss[start:stop]) / (stop - start),
                "lr": self._lr[last],
            }
            if self._speed[last]:
                record["tokens_per_second"] = self._speed[last]
            found.append(record)
        return found
