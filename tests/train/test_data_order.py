"""What a branch reads: the very samples that its source would have read next, or an order of its own."""

import dataclasses
import pickle
import shlex
import shutil

import pytest

from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest
from megatron_cpt.config.settings.schema import TrainingConfig
from megatron_cpt.data.blend.stage_order import StageOrder, read_order, write_order
from megatron_cpt.data.lists.data_list import DataEntry
from megatron_cpt.errors import DataError
from tests.distributed import RankFailure
from tests.tolerances import RUN_ROUNDINGS, assert_fp32_rounding, assert_same_bits
from tests.train.test_fork import fork
from tests.train.test_loop import TP2, losses, run_path, run_stage

MIX = ("data.mix={D0: 0.6, D1: 0.4}", "data.max_epochs=50")


def read_by(task: str, variant: str, overrides: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Train a stage; return the tokens of every sample in the order of training."""
    from megatron_cpt.train.stage import loop

    seen = []
    original = loop.microbatches

    def microbatches(*arguments, **options):
        batches = original(*arguments, **options)
        seen.extend(tuple(row.tolist()) for batch in batches for row in batch.tokens)
        return batches

    loop.microbatches = microbatches
    try:
        run_stage(task, variant, overrides)
    finally:
        loop.microbatches = original
    return seen


def words_of(out: str) -> tuple[str, tuple[str, ...]]:
    words = shlex.split(out)
    return words[words.index("--variant") + 1], tuple(word for word in words if "=" in word)


@pytest.fixture
def whole(ranks, experiment):
    """Return the task and what a run of 16 iterations reads, of which the first 8 are kept as another run's."""
    longer = (*MIX, "training.train_iters=8", "training.global_batch_size=6", "data.shuffle_in_corpus=true")
    (seen,) = ranks.run(read_by, 1, str(experiment), "base", longer)
    assert len(seen) == 48 == len(set(seen))
    return experiment, seen


def test_a_decay_branch_reads_what_its_source_would_have_read_next(ranks, whole, capsys):
    experiment, seen = whole
    code, out, _ = fork(capsys, experiment, "--iteration", "4", "--to-variant", "cool", "--decay", "4")
    assert code == 0
    variant, overrides = words_of(out)
    (branch,) = ranks.run(read_by, 1, str(experiment), variant, overrides)
    assert branch == seen[24:]
    manifest = read_manifest(run_path(experiment, variant) / "checkpoints" / "iter_0000004")
    first, last = (read_manifest(run_path(experiment, "base") / "checkpoints" / f"iter_{n:07d}") for n in (4, 8))
    assert manifest["tokens_per_corpus"] == {
        name: last["tokens_per_corpus"][name] - first["tokens_per_corpus"][name] for name in ("D0", "D1")
    }


def test_a_branch_goes_on_past_its_sources_end_and_a_branch_of_it_goes_on_in_turn(ranks, whole, capsys):
    """Past the end every shard goes on where it stopped; samples do not come again before an epoch is over."""
    experiment, seen = whole
    code, out, _ = fork(capsys, experiment, "--iteration", "8", "--to-variant", "on", "--decay", "8")
    assert code == 0
    variant, overrides = words_of(out)
    (second,) = ranks.run(read_by, 1, str(experiment), variant, overrides)
    assert len(second) == 48 and not set(second) & set(seen)
    code, out, _ = fork(capsys, experiment, "--iteration", "4", "--to-variant", "more", "--decay", "10")
    variant, overrides = words_of(out)
    (third,) = ranks.run(read_by, 1, str(experiment), variant, overrides)
    assert third == (seen + second)[24:84]
    # a branch of the branch, with another batch
    of_branch = (*MIX, "init.from_path=variant:base+on@4", "data.order=continue", "data.shuffle_in_corpus=true",
                 "training.global_batch_size=4", "training.train_iters=7")  # fmt: skip
    (fourth,) = ranks.run(read_by, 1, str(experiment), "base+again", of_branch)
    assert fourth[:24] == second[24:] and not set(fourth) & set(seen + second[:24])


def test_a_branch_resumes_exactly_and_without_its_source(ranks, whole, capsys):
    experiment, seen = whole
    _, out, _ = fork(
        capsys, experiment, "--iteration", "4", "--to-variant", "cool", "--decay", "4", "checkpoint.save_interval=2"
    )
    variant, overrides = words_of(out)
    ranks.run(read_by, 1, str(experiment), variant, overrides)
    run = run_path(experiment, variant)
    shutil.rmtree(run / "checkpoints" / "iter_0000004")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2\n")
    shutil.rmtree(run_path(experiment, "base"))
    (rest,) = ranks.run(read_by, 1, str(experiment), variant, overrides)
    assert rest == seen[36:]


def test_another_stage_reads_an_order_of_its_own_from_sample_0(ranks, whole, capsys):
    experiment, seen = whole
    _, out, _ = fork(capsys, experiment, "--iteration", "4", "--to-variant", "stage2", "training.train_iters=4")
    variant, overrides = words_of(out)
    assert not any(word.startswith("data.order") for word in overrides) and "training.seed=1238" in overrides
    (own,) = ranks.run(read_by, 1, str(experiment), variant, overrides)
    assert own != seen[24:] and own != seen[:24] and len(own) == 24
    _, out, _ = fork(capsys, experiment, "--iteration", "4", "--to-variant", "own", "--decay", "4", "--data", "own")
    assert "data.order" not in out and "training.seed=1238" in out


def test_a_branch_of_other_data_has_an_order_of_its_own_and_may_not_continue(whole, capsys):
    experiment, _ = whole
    _, out, _ = fork(capsys, experiment, "--to-variant", "x", "--decay", "4", "data.mix={D0: 1.0}")
    assert "data.order" not in out
    code, _, err = fork(capsys, experiment, "--to-variant", "x", "--data", "continue", "data.mix={D0: 1.0}")
    assert code == 2 and "data.mix is {'D0': 1.0}, not {'D0': 0.6, 'D1': 0.4}" in err
    code, _, err = fork(
        capsys,
        experiment,
        "--to-variant",
        "x",
        "--data",
        "continue",
        "training.train_iters=4",
        "training.seq_length=16",
    )
    assert code == 2 and "training.seq_length is 16, not 32" in err


def test_a_longer_run_goes_on_in_the_order_that_it_began_with(ranks, whole):
    """A consented change of length repeats nothing and leaves nothing out, also when it is changed again."""
    experiment, seen = whole
    settings = (
        *MIX,
        "training.global_batch_size=6",
        "data.shuffle_in_corpus=true",
        "checkpoint.accept_changes=[training.train_iters]",
    )
    (more,) = ranks.run(read_by, 1, str(experiment), "base", (*settings, "training.train_iters=11"))
    (last,) = ranks.run(read_by, 1, str(experiment), "base", (*settings, "training.train_iters=13"))
    read = seen + more + last
    assert len(read) == 78 == len(set(read))
    manifest = read_manifest(run_path(experiment, "base") / "checkpoints" / "iter_0000013")
    assert sum(manifest["tokens_per_corpus"].values()) == 78 * 32
    assert abs(manifest["tokens_per_corpus"]["D0"] - 0.6 * 78 * 32) <= 2 * 32


def test_a_batch_that_would_move_what_was_read_is_refused_with_the_way_out(ranks, whole):
    experiment, _ = whole
    wider = (*MIX, "training.global_batch_size=12", "training.train_iters=16", "data.shuffle_in_corpus=true")
    with pytest.raises(RankFailure, match=r"consumed 48 samples.*take 96 samples.*--data continue"):
        ranks.run(run_stage, 1, str(experiment), "base", (*wider, "checkpoint.accept_changes=true"))


def test_what_cannot_be_continued_is_refused(ranks, whole):
    experiment, _ = whole
    with pytest.raises(RankFailure, match="reads other data: data.mix"):
        ranks.run(run_stage, 1, str(experiment), "replay", ("data.order=continue",))
    with pytest.raises(RankFailure, match="data.order is continue with init.from_path None"):
        ranks.run(run_stage, 1, str(experiment), "base+new", (*MIX, "data.order=continue"))
    with pytest.raises(RankFailure, match=r"data\.order: own -> continue.*Use another variant"):
        same = (*MIX, "training.global_batch_size=6", "training.train_iters=9", "data.shuffle_in_corpus=true")
        ranks.run(run_stage, 1, str(experiment), "base", (*same, "data.order=continue", "init.from_path=variant:x"))
    with pytest.raises(RankFailure, match="would be read"):
        far = (
            "init.from_path=variant:base",
            "data.order=continue",
            "training.global_batch_size=6",
            "data.shuffle_in_corpus=true",
        )
        few = (MIX[0], "data.max_epochs=0.1", "training.train_iters=20", *far)
        ranks.run(run_stage, 1, str(experiment), "base+far", few)


def test_rounds_give_every_entry_its_share_and_windows_fit_together(tmp_path):
    entries = tuple(
        DataEntry(prefix=name, tokens=tokens, corpus=name[0]) for name, tokens in (("a1", 70), ("a2", 3), ("b1", 27))
    )
    order = StageOrder(source="x", num_samples=50, count=50, seq_length=1, seed=3, entries=entries)
    write_order(tmp_path / "order.json", order)
    training = TrainingConfig(train_samples=50, global_batch_size=10, seq_length=1)
    assert read_order(tmp_path / "order.json", training) == order

    def drawn(position: int, count: int) -> list[tuple[str, int]]:
        part = dataclasses.replace(order, position=position, count=count)
        taken = part.stage_entries
        assert sum(entry.tokens for entry in taken) == count
        starts = [range_.start for range_ in part.drawn if range_]
        numbers, samples = part.indices()
        return [
            (taken[number].prefix, starts[number] + int(sample))
            for number, sample in zip(numbers, samples, strict=True)
        ]

    whole = drawn(0, 200)
    assert len(set(whole)) == 200
    assert drawn(0, 50) + drawn(50, 101) + drawn(151, 49) == whole
    for name in ("a1", "a2", "b1"):  # each entry's samples come in order, none left out
        assert [sample for prefix, sample in whole if prefix == name] == list(range(sum(p == name for p, _ in whole)))
    (tmp_path / "order.json").write_text("{}")
    with pytest.raises(DataError, match="not the order of a stage"):
        read_order(tmp_path / "order.json", training)


def test_an_order_of_its_own_is_the_whole_round_and_keeps_entries_that_give_nothing():
    entries = tuple(DataEntry(prefix=name, tokens=tokens) for name, tokens in (("a", 1), ("b", 99)))
    own = StageOrder(num_samples=10, count=10, seq_length=1, seed=3, entries=entries)
    numbers, samples = own.indices()
    assert own.stage_entries == list(entries) and own.drawn == [range(0), range(10)]
    assert numbers.tolist() == [1] * 10 and samples.tolist() == list(range(10))
    continued = dataclasses.replace(own, source="x")
    assert [entry.prefix for entry in continued.stage_entries] == ["b"]
    assert continued.indices()[0].tolist() == [0] * 10


def test_other_ranks_get_an_order_without_the_arrays_of_its_round():
    entries = (DataEntry(prefix="a", tokens=3_000_000),)
    order = StageOrder(source="x", position=5, num_samples=300_000, count=9, seq_length=10, seed=3, entries=entries)
    assert order.drawn == [range(5, 14)]
    sent = pickle.dumps(order)
    assert len(sent) < 2000
    assert pickle.loads(sent) == order and "drawn" in vars(pickle.loads(sent))


def test_a_full_branch_without_a_change_is_its_source_going_on_under_any_layout(ranks, experiment, capsys):
    """Weights, moments, step count and data together: the branch's losses are those that the source had next."""
    assert ranks.run(run_stage, 1, str(experiment), "base") == ["finished"]
    expected = losses(experiment, "base")
    again = ("training.train_iters=4", "schedule.lr_warmup=0")
    for name, layout in (("same", ()), ("split", TP2)):
        code, out, _ = fork(
            capsys, experiment, "--iteration", "4", "--to-variant", name, "--data", "continue", *again, *layout
        )
        assert code == 0
        variant, overrides = words_of(out)
        ranks.run(run_stage, 2 if layout else 1, str(experiment), variant, overrides)
        found = losses(experiment, variant)
        wanted = {n: expected[n + 4] for n in range(1, 5)}
        if layout:
            assert_fp32_rounding(found, wanted, roundings=RUN_ROUNDINGS)
        else:
            assert_same_bits(found, wanted)
    _, out, _ = fork(
        capsys, experiment, "--iteration", "4", "--to-variant", "w", "--data", "continue", "--load", "weights", *again
    )
    variant, overrides = words_of(out)
    ranks.run(run_stage, 1, str(experiment), variant, overrides)
    fresh = losses(experiment, variant)  # the same weights and samples at first, then another optimizer state
    assert fresh[1] == expected[5] and fresh[2] != expected[6]
