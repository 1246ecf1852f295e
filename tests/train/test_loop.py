"""A stage from start to end: stages, resumption under another layout, what stops it and what refuses to start."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.convert.choices import ExportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import mcore_to_hf
from megatron_cpt.checkpoint.torch_dist.mcore import list_checkpoints, read_manifest, verify_checkpoint
from tests.distributed import RankFailure
from tests.tolerances import RUN_ROUNDINGS, assert_fp32_rounding, assert_fp64_rounding

TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "launch.gpus_per_node=2")
PP2 = ("parallel.pipeline_model_parallel_size=2", "launch.gpus_per_node=2")


def run_stage(task: str, variant: str, overrides: tuple[str, ...] = ()) -> str:
    """Train a stage on this rank and return why it ended."""
    from megatron_cpt.config.loading.resolve import load_config
    from megatron_cpt.train.stage.loop import train

    return train(load_config(Path(task), "tiny", "short", variant, overrides=overrides))


def run_path(task: Path, variant: str) -> Path:
    return task.parent.parent / "runs" / "small" / "tiny" / "short" / variant


def records(task: Path, variant: str, kind: str) -> list[dict]:
    lines = (run_path(task, variant) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(task: Path, variant: str) -> dict[int, float]:
    return {record["iteration"]: record["loss"] for record in records(task, variant, "train")}


@pytest.fixture
def after_base(ranks, experiment):
    assert ranks.run(run_stage, 1, str(experiment), "base") == ["finished"]
    return experiment


def test_stages_follow_each_other_and_a_finished_one_does_nothing_more(ranks, after_base):
    assert ranks.run(run_stage, 1, str(after_base), "replay") == ["finished"]
    trained = losses(after_base, "base")
    assert list(trained) == list(range(1, 9)) and trained[8] < trained[1]
    assert [record["lr"] for record in records(after_base, "base", "train")][:4] == [0.0, 0.0025, 0.005, 0.005]
    rates = [record["lr"] for record in records(after_base, "replay", "train")]
    assert rates[:5] == [0.005] * 5
    assert_fp64_rounding(rates[5:], [0.00375, 0.0025, 0.00125])
    validations = records(after_base, "replay", "validation")
    assert [(record["iteration"], record["corpus"]) for record in validations] == [
        (iteration, corpus) for iteration in (0, 4, 8) for corpus in ("D0", "D1")
    ]
    assert all(record["bits_per_byte"] > 0 for record in validations)
    manifest = read_manifest(run_path(after_base, "replay") / "checkpoints" / "iter_0000008")
    assert manifest["consumed_tokens"] == 8 * 8 * 32
    assert manifest["tokens_per_corpus"] == {"D1": 48 * 32, "D0": 16 * 32}
    before = (run_path(after_base, "replay") / "metrics.jsonl").read_text()
    assert ranks.run(run_stage, 1, str(after_base), "replay") == ["finished"]
    assert (run_path(after_base, "replay") / "metrics.jsonl").read_text() == before


def test_a_run_writes_the_page_that_shows_it(ranks, after_base):
    assert ranks.run(run_stage, 2, str(after_base), "replay", TP2) == ["finished"] * 2
    page = (run_path(after_base, "replay") / "report" / "report.html").read_text()
    assert "Held-out" in page
    for part in ("small: replay", "finished", "iter_0000008", "megatron-core", ">1,536<", ">75.00 %<"):
        assert part in page, part
    environment = json.loads((run_path(after_base, "replay") / "environment.json").read_text())
    assert environment["torch"] and environment["device"]


def test_a_run_that_was_killed_after_its_last_save_is_finished_by_the_same_command(ranks, after_base):
    metrics = run_path(after_base, "base") / "metrics.jsonl"
    whole = metrics.read_text()
    lines = whole.splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "end"
    metrics.write_text("".join(lines[:-1]))
    assert ranks.run(run_stage, 1, str(after_base), "base") == ["finished"]
    assert [(end["iteration"], end["reason"]) for end in records(after_base, "base", "end")] == [(8, "finished")]
    assert metrics.read_text().startswith("".join(lines[:-1]))


def test_a_run_that_lost_its_last_steps_continues_under_another_layout_as_if_nothing_happened(ranks, after_base):
    assert ranks.run(run_stage, 2, str(after_base), "replay", TP2) == ["finished"] * 2
    whole = losses(after_base, "replay")
    run = run_path(after_base, "replay")
    for iteration in (6, 8):  # as after a SIGKILL between iterations 3 and 6
        shutil.rmtree(run / "checkpoints" / f"iter_{iteration:07d}")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert ranks.run(run_stage, 2, str(after_base), "replay", PP2) == ["finished"] * 2
    starts = records(after_base, "replay", "start")
    assert [(start["iteration"], start["resumed"], start["layout"]) for start in starts] == [
        (0, False, "TP2 PP1 CP1 EP1 DP1"),
        (3, True, "TP1 PP2 CP1 EP1 DP1"),
    ]
    again = losses(after_base, "replay")
    assert_fp32_rounding(again, whole, roundings=RUN_ROUNDINGS)
    assert records(after_base, "replay", "end")[-1]["iteration"] == 8


def test_a_trained_checkpoint_becomes_a_hugging_face_folder_without_loss(ranks, experiment, tmp_path):
    assert ranks.run(run_stage, 2, str(experiment), "base", TP2) == ["finished"] * 2
    checkpoint = run_path(experiment, "base") / "checkpoints" / "iter_0000008"
    exported = mcore_to_hf(checkpoint, tmp_path / "hf", options=ExportChoices(tokenizer=None), verify=True)
    assert (exported / "config.json").exists()
    assert json.loads((exported / "conversion.json").read_text())


def test_stop_now_saves_and_the_same_command_continues(ranks, after_base):
    run = run_path(after_base, "replay")
    run.mkdir(parents=True)
    (run / "stop_now").touch()
    assert ranks.run(run_stage, 1, str(after_base), "replay") == ["stop_now"]
    assert (run / "checkpoints" / "iter_0000001" / "manifest.json").exists()
    assert not (run / "stop_now").exists()
    assert ranks.run(run_stage, 1, str(after_base), "replay") == ["finished"]


def test_save_now_saves_and_goes_on(ranks, experiment):
    run = run_path(experiment, "base")
    run.mkdir(parents=True)
    (run / "save_now").touch()
    assert ranks.run(run_stage, 1, str(experiment), "base") == ["finished"]
    assert (run / "checkpoints" / "iter_0000001" / "manifest.json").exists()
    assert all(save["stall_seconds"] == save["seconds"] > 0 for save in records(experiment, "base", "save"))


def late_stage(task: str) -> str:
    os.environ["MEGATRON_CPT_JOB_START"] = "1000000000"  # the job began long ago
    return run_stage(task, "base", ("launch.exit_before_walltime=60",))


def test_the_walltime_ends_a_run_with_a_checkpoint(ranks, experiment):
    assert ranks.run(late_stage, 1, str(experiment)) == ["walltime"]
    assert records(experiment, "base", "end")[0]["iteration"] == 1
    assert records(experiment, "base", "save")[0]["iteration"] == 1


def signalled_stage(task: str) -> str:
    import signal

    from megatron_cpt.train.watch import interrupt

    original = interrupt.Interrupts.poll

    def poll(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    interrupt.Interrupts.poll = poll
    try:
        return run_stage(task, "base")
    finally:
        interrupt.Interrupts.poll = original


def test_sigterm_ends_a_run_with_a_checkpoint(ranks, experiment):
    (reason,) = ranks.run(signalled_stage, 1, str(experiment))
    assert reason == "signal"
    assert records(experiment, "base", "save")


def stage_with_a_signal_to_rank_1(task: str, overrides: tuple[str, ...]) -> str:
    """Train; rank 1 alone gets SIGUSR1 during its second step."""
    import signal

    from megatron_cpt.train.stage import loop

    original, steps = loop.train_step, []

    def step(*arguments, **options):
        steps.append(1)
        if len(steps) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments, **options)

    loop.train_step = step
    try:
        return run_stage(task, "base", overrides)
    finally:
        loop.train_step = original


def test_a_signal_to_any_rank_ends_every_rank_with_a_checkpoint(ranks, experiment):
    assert ranks.run(stage_with_a_signal_to_rank_1, 2, str(experiment), PP2) == ["signal"] * 2
    assert [save["iteration"] for save in records(experiment, "base", "save")] == [2]


def test_a_resume_with_settings_that_change_results_is_refused_until_accepted(ranks, after_base):
    longer = ("training.train_iters=10", "optimizer.lr=1e-3")
    with pytest.raises(RankFailure, match=r"optimizer\.lr: 0\.005 -> 0\.001.*training\.train_iters: 8 -> 10"):
        ranks.run(run_stage, 1, str(after_base), "base", longer)
    accepted = (*longer, "checkpoint.accept_changes=true")
    assert ranks.run(run_stage, 1, str(after_base), "base", accepted) == ["finished"]
    last = records(after_base, "base", "train")[-1]
    assert (last["iteration"], last["lr"]) == (10, 0.001)


def test_an_architecture_that_differs_from_the_checkpoint_is_named(ranks, after_base):
    with pytest.raises(RankFailure, match="ffn_hidden_size is 64, not 128"):
        ranks.run(run_stage, 1, str(after_base), "replay", ("model.ffn_hidden_size=128",))


def test_a_missing_base_is_named(ranks, experiment):
    with pytest.raises(RankFailure, match="Train base first"):
        ranks.run(run_stage, 1, str(experiment), "replay")


def test_a_damaged_newest_checkpoint_is_walked_back_over(ranks, after_base):
    run = run_path(after_base, "base")
    (victim,) = (run / "checkpoints" / "iter_0000008").glob("__0_*.distcp")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    whole = losses(after_base, "base")
    assert ranks.run(run_stage, 1, str(after_base), "base") == ["finished"]
    assert records(after_base, "base", "start")[-1]["iteration"] == 4
    assert_fp32_rounding(losses(after_base, "base"), whole, roundings=RUN_ROUNDINGS)
    assert list((run / "checkpoints").glob("replaced_iter_0000008_*"))  # the damaged one is kept aside


def test_an_asynchronous_run_saves_the_same_and_continues(ranks, experiment):
    overrides = ("checkpoint.async_save=true", "checkpoint.save_interval=2")
    assert ranks.run(run_stage, 2, str(experiment), "base", (*overrides, *TP2)) == ["finished"] * 2
    saves = records(experiment, "base", "save")
    assert [save["iteration"] for save in saves] == [2, 4, 6, 8]
    assert all(0 < save["stall_seconds"] <= save["seconds"] for save in saves)
    root = run_path(experiment, "base") / "checkpoints"
    for save in saves:
        verify_checkpoint(root / f"iter_{save['iteration']:07d}", "full")
    whole = losses(experiment, "base")
    for iteration in (6, 8):
        shutil.rmtree(root / f"iter_{iteration:07d}")
    (root / "latest_checkpointed_iteration.txt").write_text("4\n")
    assert ranks.run(run_stage, 1, str(experiment), "base", overrides) == ["finished"]
    assert_fp32_rounding(losses(experiment, "base"), whole, roundings=RUN_ROUNDINGS)


def stage_with_a_failing_writer(task: str) -> str:
    from megatron_cpt.train.state import checkpointing

    original = checkpointing._write_and_hash

    def fail(write, directory, rank, *arguments, **options):
        if directory.name == "iter_0000004":
            raise OSError("no space left")
        original(write, directory, rank, *arguments, **options)

    checkpointing._write_and_hash = fail
    try:
        return run_stage(task, "base", ("checkpoint.async_save=true",))
    finally:
        checkpointing._write_and_hash = original


def test_a_writer_that_fails_is_followed_by_a_save_that_waits(ranks, experiment):
    assert ranks.run(stage_with_a_failing_writer, 1, str(experiment)) == ["finished"]
    good = list_checkpoints(run_path(experiment, "base") / "checkpoints")
    assert good[-1] == 8 and set(good) & {4, 5, 6, 7}
    for iteration in good:
        verify_checkpoint(run_path(experiment, "base") / "checkpoints" / f"iter_{iteration:07d}", "full")


def stage_error(task: str, variant: str) -> str:
    """Return the class of the error that ends a stage on this rank."""
    from megatron_cpt.errors import CptError

    try:
        return run_stage(task, variant, TP2)
    except CptError as error:
        return type(error).__name__


def test_a_mistake_that_rank_0_finds_ends_every_rank_with_it(ranks, experiment):
    assert ranks.run(stage_error, 2, str(experiment), "replay") == ["CheckpointError"] * 2
