import pytest

from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.report.stages import read_metrics, read_stage, read_stages, smoothed


def start(iteration: int, resumed: bool = False, layout: str = "TP2 PP1 CP1 EP1 DP1") -> dict:
    tokens = iteration * 100
    return {"kind": "start", "iteration": iteration, "consumed_tokens": tokens, "resumed": resumed, "layout": layout}


def train(iteration: int, loss: float | None = 1.0) -> dict:
    return {"kind": "train", "iteration": iteration, "consumed_tokens": iteration * 100, "loss": loss, "lr": 0.1}


def end(iteration: int, reason: str = "finished") -> dict:
    return {"kind": "end", "iteration": iteration, "reason": reason}


def test_records_after_the_checkpoint_that_was_resumed_do_not_count(write_run):
    lost = [train(iteration, loss=9.0) for iteration in (3, 4)]
    again = [train(iteration, loss=2.0) for iteration in (3, 4, 5)]
    validation = {"kind": "validation", "iteration": 4, "consumed_tokens": 400, "corpus": "D0", "loss": 9.0}
    second = start(2, resumed=True, layout="TP1 PP2 CP1 EP1 DP1")
    run = write_run("replay", [start(0), train(1), train(2), *lost, validation, second, *again, end(5)])
    stage = read_stage(run)
    assert [(record["iteration"], record["loss"]) for record in stage.train] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]
    assert stage.validation == []
    (found,) = stage.interruptions
    assert (found.reason, found.stopped_tokens, found.resumed_tokens) == ("killed", 400, 200)
    assert (found.layout_before, found.layout_after) == ("TP2 PP1 CP1 EP1 DP1", "TP1 PP2 CP1 EP1 DP1")
    assert (stage.end_reason, stage.tokens) == ("finished", 500)


def test_a_stop_that_was_asked_for_is_named_by_its_reason(write_run):
    run = write_run("a", [start(0), train(1), end(1, "walltime"), start(1, resumed=True), train(2), end(2)])
    (found,) = read_stage(run).interruptions
    assert (found.reason, found.stopped_tokens, found.resumed_tokens) == ("walltime", 100, 100)


def test_steps_that_a_roll_back_undid_do_not_count(write_run):
    records = [
        start(0),
        *(train(n, 1.0) for n in (1, 2, 3, 4)),
        {"kind": "spike", "iteration": 4, "consumed_tokens": 400},
    ]
    records += [{"kind": "rollback", "iteration": 2, "consumed_tokens": 200, "skipped": "4"}, train(3, 0.9)]
    records += [{"kind": "skip", "iteration": 4, "consumed_tokens": 400}, train(5, 0.8)]
    stage = read_stage(write_run("base", records))
    assert [record["loss"] for record in stage.train] == [1.0, 1.0, 0.9, 0.8]
    (interruption,) = stage.interruptions
    assert (interruption.reason, interruption.stopped_tokens, interruption.resumed_tokens) == ("roll-back", 400, 200)


def test_a_run_that_starts_over_forgets_what_was_before(write_run):
    stage = read_stage(write_run("a", [start(0), train(1, loss=9.0), start(0), train(1, loss=2.0)]))
    assert [record["loss"] for record in stage.train] == [2.0]
    assert stage.interruptions == []


def test_a_stage_begins_where_the_variant_that_it_forks_from_ended(write_run):
    base = write_run("base", [start(0), train(1), train(6), end(6)])
    replay = write_run("replay", [start(0), train(1), train(3), end(3)], parent="base", blend={"D1": 270, "D0": 30})
    last = write_run("last", [start(0), train(1)], parent="replay@3")
    stages = read_stages([base, replay, last])
    assert [stage.offset_tokens for stage in stages] == [0, 600, 900]
    assert stages[1].blend == {"D1": 270, "D0": 30}


def test_a_branch_begins_at_the_iteration_that_it_forks_from(write_run):
    base = write_run("base", [start(0), train(1), train(4), train(9), end(9)])
    runs = [write_run(f"branch{n}", [start(0), train(1)], parent=f"base@{n}") for n in (4, 6, 20)]
    assert [stage.offset_tokens for stage in read_stages([base, *runs])] == [0, 400, 600, 900]


def test_a_step_without_a_number_is_counted_but_no_part_of_the_curve(write_run):
    records = [start(0), train(1), train(2, loss=None), train(3, loss=float("nan")), train(4)]
    run = write_run("a", [*records, start(2, resumed=True), train(3)])
    stage = read_stage(run)
    assert [record["iteration"] for record in stage.train] == [1, 3] and stage.not_finite == [2]


def test_an_unfinished_last_line_is_passed_over_and_a_bad_one_is_named(write_run):
    run = write_run("a", [start(0), train(1)])
    path = run / "metrics.jsonl"
    good = path.read_text()
    path.write_text(good + '{"kind": "tr')
    assert len(list(read_metrics(path))) == 2
    path.write_text('{"kind": "tr\n' + good)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        list(read_metrics(path))


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_stage(tmp_path)


def test_smoothing_shifts_nothing_and_keeps_both_ends():
    assert smoothed([1.0, 3.0, 8.0, 7.0], 3) == [1.0, 4.0, 6.0, 7.0]
    line = [float(value) for value in range(20)]
    assert smoothed(line, 7) == line
