"""A run: its metrics as columns, its jobs, its checkpoints, what to do next, and its page."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_cpt.errors import ConfigError
from megatron_cpt.evaluate.page.build import write_page
from megatron_cpt.evaluate.report.stages import Stage, read_stage
from megatron_cpt.interface.html import html_table
from megatron_cpt.launch.status import JobRow, job_rows, status_text
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.find import is_run


@dataclass(frozen=True)
class Run:
    """A run directory, read when it is asked."""

    path: Path

    @cached_property
    def stage(self) -> Stage:
        """The run's records that count, as they stood when they were first asked for."""
        return read_stage(self.path, may_be_empty=True)

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """Logged steps as columns: iteration, consumed_tokens, loss, lr, ... ; fit for `pandas.DataFrame(run.metrics)`."""
        return _columns(self.stage.train)

    @property
    def validation(self) -> dict[str, list[Any]]:
        """Validations as columns: iteration, consumed_tokens, corpus, loss, bits_per_byte."""
        return _columns(self.stage.validation)

    @property
    def jobs(self) -> list[JobRow]:
        """The run's jobs with the scheduler's states."""
        return job_rows(RunDir(self.path))

    @property
    def status(self) -> str:
        """The table of `megatron-cpt status`."""
        return status_text(RunDir(self.path), None)

    @property
    def checkpoints(self) -> list[Path]:
        """Kept checkpoints, oldest first."""
        return sorted(path.parent for path in RunDir(self.path).checkpoints.glob("iter_*/manifest.json"))

    @property
    def exports(self) -> list[Path]:
        """Hugging Face folders made of them, oldest first."""
        return sorted(path.parent for path in RunDir(self.path).checkpoints_hf.glob("iter_*/config.json"))

    def advice(self, *, previous: str | Path | None = None, old: Sequence[str] = ()) -> str:
        """Return what the cookbook would do next; `previous` is the run before, `old` the corpora not to forget."""
        from megatron_cpt.evaluate.advice.judge import advice_text, advise  # heavy: numpy

        return advice_text(advise(self.path, None if previous is None else Path(previous), old))

    def page(self) -> Path:
        """Rewrite the run's report.html and return its path."""
        return write_page([self.path], RunDir(self.path).report / "report.html")

    def _repr_html_(self) -> str:
        stage, last = self.stage, self.stage.train[-1] if self.stage.train else {}
        rows: list[tuple[str, object]] = [
            ("state", stage.end_reason or ("no end record" if stage.train else "not trained")),
            ("iteration", last.get("iteration", 0)),
            ("tokens", f"{stage.tokens:,}"),
            ("loss", last.get("loss", "")),
        ]
        rows += [(job.stage, f"{job.state} {job.reason}".strip()) for job in self.jobs]
        return html_table(("", ""), rows, str(self.path))


def run(path: str | Path) -> Run:
    """Return a run by its directory.

    Raises: ConfigError when the folder is no run directory.
    """
    if not is_run(Path(path)):
        raise ConfigError(f"{path}: no run directory: no metrics.jsonl, ledger or config.yaml in it. Check the path.")
    return Run(Path(path))


def _columns(records: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name != "kind"]
    return {name: [record.get(name) for record in records] for name in names}
