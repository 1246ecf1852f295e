"""A rank that was told something else, or sees other data, is named with its host and the key before anything is computed."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.distributed import RankFailure
from tests.train.test_loop import run_path, run_stage
from tests.train.test_watchdog import PP2


def differing(task: str, rank: str, key: str, value: str) -> str:
    """Train a stage of which one rank was given another setting, or moved to another data folder."""
    overrides: tuple[str, ...] = ("launch.hang_timeout=20",)
    if os.environ["RANK"] == rank:
        overrides += (f"{key}={value}",)
    return run_stage(task, "base", overrides)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.lr", "1e-4", "optimizer.lr is 0.0001 instead of 0.005"),
        ("training.micro_batch_size", "1", "training.micro_batch_size is 1 instead of 2"),
        ("training.train_iters", "9", "training.train_iters is 9 instead of 8"),
        ("model.num_layers", "4", "model.num_layers is 4 instead of 2"),
        ("training.seed", "7", "training.seed is 7 instead of 1234"),
        ("paths.data_dir", "/elsewhere", "paths.data_dir is '/elsewhere' instead of"),
        ("data.corpora.D0.tokens", "[tokens/D1_text_document]", "data.corpora.D0.tokens"),
    ],
)
def test_another_setting_on_one_rank_is_named_on_every_rank(ranks, experiment, key, value, said):
    with pytest.raises(RankFailure) as failure:
        ranks.run(differing, 2, str(experiment), "1", key, value, timeout=60)
    text = str(failure.value)
    assert text.count(f"rank 1 on {socket.gethostname()} differs from rank 0") == 2 and said in text
    assert not (run_path(experiment, "base") / "checkpoints").exists()


def other_code(task: str) -> str:
    """Train a stage of which one rank has another version of torch."""
    from megatron_cpt.train.backend import agreement

    if os.environ["RANK"] == "1":
        original = agreement.importlib.metadata.version
        agreement.importlib.metadata.version = lambda name: "1.0" if name == "torch" else original(name)
    return run_stage(task, "base", PP2)


def test_another_version_on_one_rank_is_named(ranks, experiment):
    with pytest.raises(RankFailure, match="version of torch is '1.0' instead of"):
        ranks.run(other_code, 2, str(experiment), timeout=60)


def other_data(task: str, moved: str) -> str:
    """Train a stage of which one rank's node has mounted another folder where the data are."""
    from megatron_cpt.train.backend import agreement

    if os.environ["RANK"] == "1":
        original = agreement.bin_path
        agreement.bin_path = lambda prefix: Path(moved, original(prefix).name)
    return run_stage(task, "base", PP2)


def test_other_data_on_one_rank_are_named(ranks, experiment, experiment_data, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    with pytest.raises(RankFailure, match="D0_text_document is .*No such file"):
        ranks.run(other_data, 2, str(experiment), str(moved), timeout=60)
    for path in (experiment_data / "tokens").glob("*.bin"):
        shutil.copy(path, moved)
        with (moved / path.name).open("ab") as file:
            file.write(b"\0\0")
    with pytest.raises(RankFailure, match="rank 1 on .* differs from rank 0 .* bytes, manifest"):
        ranks.run(other_data, 2, str(experiment), str(moved), timeout=60)
