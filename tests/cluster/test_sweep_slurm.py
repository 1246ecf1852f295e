"""A sweep as a job array on a real Slurm: one point fails, the report is made, a rerun submits that point alone."""

import pytest
import yaml

from tests.launch.test_sweep import run_sweep_with_a_failing_point, stand_in_for_training, task

__all__ = ["task"]
pytestmark = [pytest.mark.cluster, pytest.mark.full, pytest.mark.timeout(300)]


def test_a_sweep_runs_as_an_array_and_a_rerun_submits_what_is_missing(slurm, task, monkeypatch):
    site = {
        "launch": {"scheduler": "slurm", "nodes": 1, "gpus_per_node": 1, "walltime": 300},
        "site": {"queue": "debug", "processes": "rank", "launcher": "srun --nodes={nodes} --ntasks={processes}"},
    }
    (task.parents[1] / "site.yaml").write_text(yaml.safe_dump(site))
    stand_in_for_training(task.parents[1], monkeypatch)
    shown = run_sweep_with_a_failing_point(task, "slurm")
    assert "#SBATCH --array=0-1" in shown and "afterany:<sweep>" in shown
