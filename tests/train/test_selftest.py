"""`doctor --deep`: small computations in processes of their own, and how their failures are told."""

import sys

import pytest

from megatron_cpt.train.tools import selftest


def test_a_product_on_this_machines_devices_is_right():
    assert "bf16 product right" in selftest.kernel()


@pytest.mark.full
def test_documents_become_a_trained_checkpoint():
    assert selftest.pipeline().endswith("saved a checkpoint")


def test_a_step_that_fails_is_told_by_its_error_not_by_the_traceback():
    program = "import sys; sys.stderr.write('noise\\n'); raise RuntimeError('the sum is 2')"
    finding = selftest._finding("all-reduce", [sys.executable, "-c", program])
    assert finding.level == "problem"
    assert finding.found == "exit code 1: RuntimeError: the sum is 2"


def test_a_step_that_hangs_is_told(monkeypatch):
    monkeypatch.setattr(selftest, "TIMEOUT_SECONDS", 0.5)
    finding = selftest._finding("kernel", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert finding.found == "not done after 0.5 s"


def test_two_ranks_sum_over_gloo(ranks):
    assert ranks.run(selftest.all_reduce, 2) == ["2 ranks over gloo"] * 2
