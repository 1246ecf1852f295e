"""What of a job's environment is written beside its log, and what never is."""

import json

from megatron_cpt.run.environment import job_environment, write_environment

GIVEN = {
    "SLURM_JOB_ID": "7",
    "NCCL_DEBUG": "INFO",
    "LOADEDMODULES": "cuda/12:nccl",
    "FABRIC": "on",
    "HOME": "/home/somebody",
    "HF_TOKEN": "hf_secret",
    "WANDB_API_KEY": "secret",
    "SLURM_AUTH_COOKIE": "secret",
    "MEGATRON_CPT_ENDPOINT": "https://user:secret@host/x",
    "PYTHON_PASSWORD": "secret",
}


def test_the_record_holds_what_shapes_a_run_and_no_secret(tmp_path):
    write_environment(tmp_path / "environment.json", GIVEN, ("FABRIC", "HF_TOKEN"))
    text = (tmp_path / "environment.json").read_text()
    assert "secret" not in text and "/home/somebody" not in text
    record = json.loads(text)
    assert record["variables"] == {
        "FABRIC": "on", "LOADEDMODULES": "cuda/12:nccl", "NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    assert record["modules"] == ["cuda/12", "nccl"] and "torch" in record["packages"]


def test_a_device_tool_that_hangs_or_fails_is_part_of_the_record(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/bash\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert job_environment({})["devices"]["nvidia-smi"] == "NVIDIA-SMI has failed"
    tool.write_text("#!/bin/bash\nsleep 60\n")
    monkeypatch.setattr("megatron_cpt.run.environment._SECONDS", 0.2)
    assert "no answer" in job_environment({})["devices"]["nvidia-smi"]
