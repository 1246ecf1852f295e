"""The distributed test helper: what it returns, and how it behaves when ranks fail."""

import os
import time

import pytest

from tests.distributed import RankFailure, RankPool, run_ranks


def process_id_and_rank():
    """Return the id of the rank's lasting process (a call runs in a fork of it), its rank and the number of ranks."""
    return os.getppid(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def set_a_global():
    """Return whether an earlier call in this rank has been here."""
    found = hasattr(os, "left_behind")
    os.left_behind = True
    return found


def sum_over_ranks(offset):
    import torch

    torch.distributed.init_process_group("gloo")
    value = torch.tensor([torch.distributed.get_rank() + offset])
    torch.distributed.all_reduce(value)
    return value.item()


def raise_on_rank_one():
    import torch

    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise ValueError("bad luck on rank one")
    torch.distributed.barrier()


def raise_on_every_rank():
    raise ValueError("all agree")


def exit_on_rank_one():
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(60)


def sleep_where_you_can_be_seen():
    time.sleep(60)


def test_ranks_reduce_together_and_stay_alive_between_calls(ranks):
    first = ranks.run(process_id_and_rank, 2)
    assert ranks.run(sum_over_ranks, 2, 10) == [21, 21]
    assert ranks.run(sum_over_ranks, 2, 0) == [1, 1]
    assert ranks.run(process_id_and_rank, 2) == first
    assert [(rank, size) for _, rank, size in first] == [("0", "2"), ("1", "2")]


def test_a_call_finds_nothing_of_an_earlier_one(ranks):
    assert [ranks.run(set_a_global, 1) for _ in range(2)] == [[False], [False]]


def test_one_failing_rank_shows_its_traceback_though_the_other_waits_for_it():
    with RankPool() as pool:
        with pytest.raises(RankFailure, match="(?s)^rank 1: .*bad luck on rank one"):
            pool.run(raise_on_rank_one, 2, timeout=60)
        assert len(pool.run(process_id_and_rank, 2)) == 2


def test_ranks_that_all_raise_are_kept_for_the_next_call():
    with RankPool() as pool:
        before = pool.run(process_id_and_rank, 2)
        with pytest.raises(RankFailure, match="all agree"):
            pool.run(raise_on_every_rank, 2)
        assert pool.run(process_id_and_rank, 2) == before


def test_a_rank_that_dies_is_reported_with_its_exit_code_and_replaced():
    with RankPool() as pool:
        with pytest.raises(RankFailure, match="rank 1: died with exit code 7"):
            pool.run(exit_on_rank_one, 2)
        assert len(pool.run(process_id_and_rank, 2)) == 2


def test_a_time_out_names_the_line_where_a_rank_hangs_and_leaves_no_process():
    with RankPool() as pool:
        pool.run(process_id_and_rank, 1)
        (process_id, _, _), *_ = pool.run(process_id_and_rank, 1)
        with pytest.raises(RankFailure, match="(?s)not done after 1 s.*sleep_where_you_can_be_seen"):
            pool.run(sleep_where_you_can_be_seen, 1, timeout=1)
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_fresh_processes_run_a_function_named_by_its_module():
    assert run_ranks("tests.test_distributed:process_id_and_rank", 1)[0][1:] == ("0", "1")


def test_a_local_function_is_refused_before_any_process_starts():
    with RankPool() as pool, pytest.raises(ValueError, match="top level of a module"):
        pool.run(lambda: None, 1)
