"""The run directory: one folder holds the configuration, jobs, logs, metrics and checkpoints of a run."""

from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.settings.schema import RunConfig


@dataclass(frozen=True)
class RunDir:
    """Paths inside `<runs_dir>/<task>/<params>/<size>/<variant>`."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved configuration with the origin of each value."""
        return self.path / "config.yaml"

    @property
    def revision_path(self) -> Path:
        """The code revision that ran last."""
        return self.path / "revision.txt"

    @property
    def environment_path(self) -> Path:
        """Versions, device and variables of the last start."""
        return self.path / "environment.json"

    @property
    def data_list_path(self) -> Path:
        """The token-weighted data list of the stage, with each entry's corpus."""
        return self.path / "train_data.yaml"

    @property
    def data_order_path(self) -> Path:
        """The order of samples that the stage continues, if it does not start its own order at sample 0."""
        return self.path / "data_order.json"

    @property
    def superseded(self) -> Path:
        """Settings and data lists of a run whose data were changed, per last iteration (`run/data_history.py`)."""
        return self.path / "superseded"

    @property
    def jobs(self) -> Path:
        """Rendered job scripts and the submission ledger."""
        return self.path / "jobs"

    @property
    def logs(self) -> Path:
        """One folder per job."""
        return self.path / "logs"

    @property
    def metrics_path(self) -> Path:
        """One JSON record per line: starts, training steps, validations, saves, ends."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Megatron checkpoints `iter_%07d` and their tracker file."""
        return self.path / "checkpoints"

    @property
    def checkpoints_hf(self) -> Path:
        """Hugging Face exports `iter_%07d`."""
        return self.path / "checkpoints_hf"

    @property
    def cache(self) -> Path:
        """Index caches of megatron-core's datasets."""
        return self.path / "cache"

    @property
    def skip_iterations_path(self) -> Path:
        """Ranges of iterations that pass without a step; a person or a roll-back writes it."""
        return self.path / "skip_iterations.txt"

    @property
    def report(self) -> Path:
        """Plots and tables."""
        return self.path / "report"


def run_dir(config: RunConfig) -> RunDir:
    """Return the run directory of a configuration."""
    return RunDir(Path(config.paths.runs_dir) / config.task / config.params / config.size / config.variant)
