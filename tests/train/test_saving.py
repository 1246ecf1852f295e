"""A save that is killed, truncated, flipped or out of room at any stage costs nothing that was good before it."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.errors import CheckpointError
from megatron_cpt.run.lock import HELD, is_held_for_us, run_lock
from tests.distributed import RankFailure
from tests.tiers import full_except
from tests.train.test_loop import records, run_path, run_stage
from tests.train.tiny import batches, manifest_of, run_steps, tiny_config

TP = "tensor_model_parallel_size"


def import_training() -> None:
    """Import what training needs, so that ranks which are killed later need not."""
    import megatron_cpt.train.stage.loop  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def warm(ranks):
    """Let the rank's process import before it forks: a killed rank cannot tell what it imported."""
    ranks.run(import_training, 1)


def save_twice(root: str, is_async: bool, disturb: str) -> str:
    """Save iteration 1, train a step, save iteration 2 disturbed at a stage; return the error's text."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step
    from megatron_cpt.train.state import checkpointing

    config = tiny_config()
    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    checkpointing.save_checkpoint(Path(root), 1, model, optimizer, manifest_of(config, 1))
    train_step(model, optimizer, batches(config, 0), config, 1e-3)
    action, _, name = disturb.partition(":")
    if action == "fill":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    else:
        original = getattr(checkpointing, name)

        def disturbed(*arguments, **options):
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            if action == "steal":
                os.environ[HELD] = f"token@{root}/lock.json"  # as of a job whose lock another one has taken
                return result
            if action == "kill-after":
                os.kill(os.getpid(), signal.SIGKILL)
            (part,) = (Path(root) / "iter_0000002").glob("__0_0.distcp")
            content = bytearray(part.read_bytes())
            content[len(content) // 2] ^= 1
            part.write_bytes(content if action == "flip" else content[:-1])
            return result

        setattr(checkpointing, name, disturbed)
    checkpointing.READ_BACK_WAIT_SECONDS = 0.01
    queue = AsyncCallsQueue() if is_async else None
    problem = ""
    try:
        checkpointing.save_checkpoint(Path(root), 2, model, optimizer, manifest_of(config, 2), queue=queue)
        if queue is not None:
            queue.maybe_finalize_async_calls(blocking=True)
    except BaseException as error:  # torch's CheckpointException is no Exception
        problem = f"{type(error).__name__}: {error}"
    finish_parallel()
    return problem


STAGES = ("kill-after:_prepare_folder", "kill:_common_state", "kill:_gathered_hashes", "kill:write_common",
          "kill:write_manifest", "kill:write_tracker")  # fmt: skip


@pytest.mark.parametrize(
    ("is_async", "disturb"),
    full_except(
        [*((False, stage) for stage in STAGES), (True, "kill:_hash_files"), (True, "kill:write_common")],
        (False, "kill:write_common"),
        (True, "kill:_hash_files"),
    ),
)
def test_a_save_killed_at_any_stage_leaves_the_one_before_and_the_next_run_loads_it(ranks, tmp_path, is_async, disturb):
    if is_async and disturb == "kill:_hash_files":  # the writer process dies; the training process hears of it
        assert ranks.run(save_twice, 1, str(tmp_path), is_async, disturb)[0]
    else:
        with pytest.raises(RankFailure):
            ranks.run(save_twice, 1, str(tmp_path), is_async, disturb)
    assert mcore.newest_good_checkpoint(tmp_path) == tmp_path / "iter_0000001"
    assert mcore.read_tracker(tmp_path) == 1
    if disturb == "kill:write_common":
        ranks.run(run_steps, 1, tiny_config(), 1, 2, str(tmp_path / "iter_0000001"), str(tmp_path))
        assert mcore.newest_good_checkpoint(tmp_path) == tmp_path / "iter_0000002"


@pytest.mark.parametrize("is_async", full_except([False, True], False))
@pytest.mark.parametrize(
    "disturb", full_except(["fill", "flip:_gathered_hashes", "truncate:_gathered_hashes"], "flip:_gathered_hashes")
)
def test_a_save_that_fails_says_so_and_does_not_count(ranks, tmp_path, is_async, disturb):
    (problem,) = ranks.run(save_twice, 1, str(tmp_path), is_async, disturb)
    assert problem
    if disturb != "fill":
        assert "reads back with another hash" in problem
    assert mcore.newest_good_checkpoint(tmp_path) == tmp_path / "iter_0000001"
    assert mcore.read_tracker(tmp_path) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_job_that_lost_its_lock_saves_nothing(ranks, tmp_path, is_async):
    (problem,) = ranks.run(save_twice, 1, str(tmp_path), is_async, "steal:_gathered_hashes")
    assert "the lock was lost" in problem
    assert mcore.newest_good_checkpoint(tmp_path) == tmp_path / "iter_0000001"
    assert mcore.read_tracker(tmp_path) == 1


def test_damage_to_any_file_of_a_checkpoint_is_found_and_named(ranks, tmp_path):
    ranks.run(run_steps, 2, tiny_config(**{TP: 2}), 0, 1, None, str(tmp_path))
    whole = tmp_path / "iter_0000001"
    files = sorted(path.name for path in whole.iterdir())
    assert {"common.pt", "metadata.json", ".metadata", "manifest.json"} < set(files)
    for name in files:
        for damage in ("flip", "truncate", "remove"):
            copy = tmp_path / "copy"
            shutil.copytree(whole, copy)
            content = bytearray((copy / name).read_bytes())
            content[len(content) * 2 // 3] ^= 4
            (copy / name).write_bytes(content if damage == "flip" else content[:-1])
            if damage == "remove":
                (copy / name).unlink()
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                mcore.verify_checkpoint(copy, "full")
            shutil.rmtree(copy)


def test_too_little_room_is_said_before_a_save_begins(ranks, tmp_path):
    (problem,) = ranks.run(save_without_room, 1, str(tmp_path))
    assert "are needed" in problem and mcore.iterations_on_disk(tmp_path) == []


def save_without_room(root: str) -> str:
    """Save where the file system says that it has 1000 bytes left."""
    usage = type("Usage", (), {"free": 1000})()
    mcore.shutil.disk_usage = lambda path: usage
    try:
        run_steps(tiny_config(), 0, 0, None, root)
    except CheckpointError as error:
        return str(error)
    return ""


def test_old_checkpoints_go_by_number_and_by_bytes(ranks, experiment):
    overrides = ("checkpoint.save_interval=2", "checkpoint.keep_bytes=1")
    assert ranks.run(run_stage, 1, str(experiment), "base", overrides) == ["finished"]
    assert mcore.list_checkpoints(run_path(experiment, "base") / "checkpoints") == [8]
    assert len(records(experiment, "base", "save")) == 4


def test_a_second_training_of_a_run_is_refused_with_or_without_launcher(ranks, experiment):
    path = run_path(experiment, "base") / "jobs" / "lock.json"
    with run_lock(path, "another job"), pytest.raises(RankFailure, match="held by another job"):
        ranks.run(run_stage, 2, str(experiment), "base", ("launch.gpus_per_node=2",))
    assert ranks.run(run_stage, 1, str(experiment), "base") == ["finished"]
    assert not path.exists()


def test_a_job_tells_what_it_starts_that_it_holds_the_lock(tmp_path):
    with run_lock(tmp_path / "lock.json", "a job"):
        assert is_held_for_us(tmp_path / "lock.json") and not is_held_for_us(tmp_path / "other.json")
    assert HELD not in os.environ


def stage_with_a_bad_mount(task: str, folder: str) -> str:
    """Train a stage of which rank 1 cannot read the newest checkpoint, which rank 0 can."""
    import errno

    from megatron_cpt.train.state import approved

    original = approved._ApprovedReader

    class Refusing(original):
        def __init__(self, directory):
            if os.environ["RANK"] == "1" and directory.name == folder:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(directory / ".metadata"))
            super().__init__(directory)

    approved._ApprovedReader = Refusing
    return run_stage(task, "base", ("checkpoint.save_interval=2", "launch.gpus_per_node=2"))


def test_a_checkpoint_that_one_rank_cannot_read_is_walked_back_over_by_all(ranks, experiment):
    overrides = ("checkpoint.save_interval=2", "launch.gpus_per_node=2")
    assert ranks.run(run_stage, 2, str(experiment), "base", overrides) == ["finished"] * 2
    checkpoints = run_path(experiment, "base") / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000008")  # as after a kill behind iteration 6
    mcore.write_tracker(checkpoints, 6)
    assert ranks.run(stage_with_a_bad_mount, 2, str(experiment), "iter_0000006") == ["finished"] * 2
    starts = records(experiment, "base", "start")
    assert [start["iteration"] for start in starts] == [0, 4]
    assert mcore.newest_good_checkpoint(checkpoints).name == "iter_0000008"
