"""Logging and progress: results go to stdout, everything else to stderr, INFO from one rank only."""

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import ClassVar, TextIO

CLEAR = "\r\x1b[K"
TERMINAL_SECONDS = 0.3
"""Between two looks at progress on a terminal."""
SENSIBLE_SECONDS, SENSIBLE_SHARE = 2.0, 0.005
"""Amount of work before the remaining time is estimated."""


def configure_logging(level: int = logging.INFO) -> None:
    """Send log records to stderr as `HH:MM:SS message`; ranks above 0 log warnings and errors only.

    The rank is read from the environment variable `RANK`, which torchrun and our launchers set.
    """
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if rank == "0" and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        handler = TerminalHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if rank == "0" else max(level, logging.WARNING))
    # Libraries warn about what is missing on a CPU and about each other's interfaces; their errors are shown.
    logging.captureWarnings(True)
    for noisy in ("megatron", "transformers", "matplotlib", "torch", "torch.utils.cpp_extension", "py.warnings"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Shows progress on one line that is written over, and warnings and errors in colour unless NO_COLOR is set.

    If stderr is not a terminal, none of this is used: every record is a line.
    """

    _COLOURS: ClassVar = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}

    def __init__(self, stream: TextIO):
        super().__init__(stream)
        self._has_open_line = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record: progress over the open line, anything else on a line of its own."""
        is_progress = bool(getattr(record, "is_progress", False))
        text = self.format(record)
        if is_progress:
            text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be written over
        elif record.levelno in self._COLOURS and not os.environ.get("NO_COLOR"):
            text = f"\x1b[{self._COLOURS[record.levelno]}m{text}\x1b[0m"
        with contextlib.suppress(OSError):
            self.stream.write(f"{CLEAR if self._has_open_line else ''}{text}{'' if is_progress else chr(10)}")
            self.stream.flush()
        self._has_open_line = is_progress

    def close(self) -> None:
        """End the open line."""
        if self._has_open_line:
            with contextlib.suppress(OSError, ValueError):
                self.stream.write("\n")
                self.stream.flush()
            self._has_open_line = False
        super().close()


class Progress:
    """Rate and remaining time of a long operation, logged at most every `interval_seconds`.

    `total` and the increments share one unit (bytes, documents, tensors), named by `unit`.
    """

    def __init__(self, label: str, total: float | None, unit: str, interval_seconds: float = 5.0):
        self.label, self.total, self.unit = label, total, unit
        self.interval_seconds = interval_seconds
        self.done = 0.0
        self.started = self.logged = time.monotonic()

    def add(self, amount: float, note: str = "") -> None:
        """Count `amount` more; log a line when the last one is old enough."""
        self.done += amount
        now = time.monotonic()
        is_terminal = any(isinstance(handler, TerminalHandler) for handler in logging.getLogger().handlers)
        if now - self.logged >= (
            min(self.interval_seconds, TERMINAL_SECONDS) if is_terminal else self.interval_seconds
        ):
            self.logged = now
            logging.getLogger(__name__).info("%s", self.line(note), extra={"is_progress": True})

    def line(self, note: str = "") -> str:
        """Return `label: 12% (3.1 of 25.8 MB), 5.2 MB/s, 4 s left`."""
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        parts = [f"{_short(rate)} {self.unit}/s"]
        if self.total:
            share = (
                f"{self.label}: {self.done / self.total:.0%} ({_short(self.done)} of {_short(self.total)} {self.unit})"
            )
            is_told = time.monotonic() - self.started >= SENSIBLE_SECONDS and self.done / self.total >= SENSIBLE_SHARE
            if rate > 0 and is_told:  # the first files are no measure of the rest
                parts.append(f"{format_seconds(max(self.total - self.done, 0) / rate)} left")
        else:
            share = f"{self.label}: {_short(self.done)} {self.unit}"
        if note:
            parts.append(note)
        return ", ".join([share, *parts])


def format_seconds(seconds: float) -> str:
    """Return `5.2 s`, `3m05s`, `2h03m` or `4d07h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"


def format_count(number: float) -> str:
    """Return a count with a decimal suffix: `950`, `12.3K`, `5.00M`, `80.0B`, `1.20T`."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}" if abs(number) / size < 1000 else f"{number / size:.0f}{suffix}"
    return f"{number:.0f}"


def format_bytes(number: float) -> str:
    """Return a size in binary units: `512 B`, `1.5 KiB`, `24.0 GiB`."""
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or suffix == "TiB":
            return f"{number:.0f} B" if suffix == "B" else f"{number:.1f} {suffix}"
        number /= 1024
    raise AssertionError("unreachable")


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as lines whose columns start at the same place."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _short(number: float) -> str:
    return f"{number:,.1f}" if number < 1000 else f"{number:,.0f}"
