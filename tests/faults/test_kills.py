"""Verbs that are killed at a random moment, at least 20 times each: the same command then gives what an undisturbed run gives."""

import os
import random
import signal

import pytest

from tests.faults.test_disk import NAMES, content, inputs, verbs  # noqa: F401

KILLS = int(os.environ.get("KILLS", "20"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM], ids=["KILL", "HUP", "TERM"])
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_verb_leaves_nothing_that_the_next_one_minds(name, number, inputs, tmp_path, verb):  # noqa: F811
    undisturbed = verb(verbs(inputs, tmp_path / "whole")[name])
    assert undisturbed["code"] == 0, undisturbed["err"]
    expected, killed = content(tmp_path / "whole"), 0
    chooser = random.Random(f"{name} {number}")
    times = KILLS if number == signal.SIGKILL else max(KILLS // 5, 1)
    for trial in range(6 * times):  # a trial may end before it is killed: it does not count
        if killed == times:
            break
        output = tmp_path / f"out{trial}"
        after = undisturbed["seconds"] * chooser.uniform(0.02, 0.9)
        done = verb(verbs(inputs, output)[name], signal=number, after=after)
        killed += done["code"] == -number
        assert done["left"] == [], f"{name}: processes live on"
        again = verb(verbs(inputs, output)[name])
        assert again["code"] == 0, again["err"][-2000:]
        assert content(output) == expected
        assert not list(tmp_path.glob(f".out{trial}*.partial"))
    assert killed == times
