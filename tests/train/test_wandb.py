"""Weights & Biases is optional: one rank reports, a run keeps its id, and a missing package is named before training."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

from megatron_cpt.errors import ConfigError
from megatron_cpt.run.directory import RunDir
from megatron_cpt.train.watch.wandb_run import check_wandb, start_wandb
from tests.train.test_loop import records, run_path, run_stage
from tests.train.test_metrics import config


class FakeWandb(types.ModuleType):
    """Writes what it is told to a file, as the ranks that import it are other processes."""

    def __init__(self, folder: Path):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        self.path = folder / f"wandb_{os.environ.get('RANK', '0')}.jsonl"

    def init(self, **options):
        self._write(init=options)
        return self

    def define_metric(self, name, step_metric=None):
        self._write(metric=name, over=step_metric)

    def log(self, values):
        self._write(step=values["iteration"], values=values)

    def finish(self):
        self._write(finish=True)

    def _write(self, **record):
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def test_a_missing_package_is_a_clear_mistake(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"extra wandb \(pip install -e '.\[wandb\]'"):
        check_wandb(config(wandb_project="p").logging)
    check_wandb(config().logging)


def test_offline_is_passed_on_and_the_variable_wins(monkeypatch, tmp_path):
    fake = FakeWandb(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for _ in range(2):
        start_wandb(RunDir(tmp_path), config(wandb_project="p", wandb_mode="offline"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start_wandb(RunDir(tmp_path), config(wandb_project="p", wandb_mode="offline"))
    lines = [json.loads(line) for line in fake.path.read_text().splitlines()]
    first, second, third = (line["init"] for line in lines if "init" in line)
    assert {"metric": "*", "over": "iteration"} in lines
    assert first == second and first["mode"] == "offline" and first["resume"] == "allow"
    assert first["config"]["megatron_cpt"]["model"]["num_layers"] == 32
    assert third["mode"] == "disabled"


def stage_with_wandb(task: str, folder: str) -> str:
    sys.modules["wandb"] = FakeWandb(Path(folder))
    return run_stage(task, "base", ("logging.wandb_project=p", "launch.gpus_per_node=2", "training.train_iters=2"))


def test_rank_0_reports_what_the_metrics_file_says(ranks, experiment, tmp_path):
    ranks.run(stage_with_wandb, 2, str(experiment), str(tmp_path))
    assert [path.name for path in tmp_path.glob("wandb_*.jsonl")] == ["wandb_0.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "wandb_0.jsonl").read_text().splitlines()]
    assert lines[0]["init"]["project"] == "p" and lines[0]["init"]["dir"] == str(run_path(experiment, "base"))
    steps = records(experiment, "base", "train")
    assert [line["values"]["train/loss"] for line in lines if "step" in line] == [step["loss"] for step in steps]
    assert lines[-1] == {"finish": True}
