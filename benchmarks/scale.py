"""What looking at a run costs as it grows: `checkpoint list`, `status`, `report` and `advise`, CPU seconds and memory.

Each line is a process of its own, measured from the end of its imports. The last column is the growth for twice the input:
2 is in proportion, below is better.

    python benchmarks/scale.py [STEPS [CHECKPOINTS]]      default: 1000000 1000
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_cpt.checkpoint.torch_dist import mcore

VERBS = {
    "checkpoint list": ("megatron_cpt.checkpoint.torch_dist.table", "list"),
    "status": ("megatron_cpt.launch.status", "status"),
    "report": ("megatron_cpt.evaluate.report.markdown", "report"),
    "advise": ("megatron_cpt.evaluate.advice.judge", "advise"),
}
PROGRAM = """
import importlib, json, resource, sys, time
from pathlib import Path
module, what, folder = importlib.import_module(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
run = folder / "run"
before = time.process_time()
if what == "list":
    module.checkpoint_table(run / "checkpoints", set())
elif what == "status":
    from megatron_cpt.run.directory import RunDir
    module.status_text(RunDir(run), None)
elif what == "report":
    module.write_report([run], folder / "report")
else:
    module.read_stage(run, module.STEP_FIELDS)
    module._before_cooldown(run, 1.0)
print(json.dumps([time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def write_run(run: Path, steps: int, checkpoints: int) -> None:
    """Write the records of a run with this many logged steps and checkpoints of 256 files."""
    (run / "jobs").mkdir(parents=True)
    (run / "jobs" / "ledger.jsonl").write_text('{"job": "7", "time": 1.0, "state": "finished"}\n')
    with (run / "metrics.jsonl").open("w") as file:
        start = {"kind": "start", "iteration": 0, "consumed_tokens": 0, "resumed": False, "layout": "TP1", "time": 0.5}
        file.write(json.dumps(start) + "\n")
        for number in range(1, steps + 1):
            record = {
                "kind": "train", "iteration": number, "consumed_tokens": number * 4096, "consumed_samples": number,
                "loss": 3 + 1 / number, "lr": 1e-4, "weight_decay": 0.1, "grad_norm": 1.1, "tokens_per_second": 1e5,
                "step_seconds": 0.1, "data_seconds": 0.01, "memory_bytes": 123456789, "flops": 1e14, "time": float(number),
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    files = {f"__{rank}_{part}.distcp": {"bytes": 1, "hash": "0" * 32} for rank in range(128) for part in (0, 1)}
    for number in range(1, checkpoints + 1):
        directory = mcore.checkpoint_dir(run / "checkpoints", number)
        directory.mkdir(parents=True)
        manifest = {"format": 1, "iteration": number, "consumed_tokens": number, "content": "full", "files": files}
        mcore.write_json(directory / "manifest.json", {**manifest, "checksum": mcore._checksum(manifest)})


def measure(folder: Path) -> dict[str, tuple[float, float]]:
    """Return verb -> CPU seconds and MiB."""
    found = {}
    for verb, (module, what) in VERBS.items():
        command = [sys.executable, "-c", PROGRAM, module, what, str(folder)]
        found[verb] = tuple(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return found


def main() -> None:
    """Print the table."""
    steps, checkpoints = (int(word) for word in (*sys.argv[1:], "1000000", "1000")[:2])
    results = []
    for part in (2, 1):
        with tempfile.TemporaryDirectory() as scratch:
            write_run(Path(scratch) / "run", steps // part, checkpoints // part)
            results.append(measure(Path(scratch)))
    print(f"{steps:,} steps, {checkpoints:,} checkpoints\n{'verb':<18}{'CPU s':>8}{'MiB':>8}{'x2 input':>10}")
    for verb, (seconds, megabytes) in results[1].items():
        print(f"{verb:<18}{seconds:>8.2f}{megabytes:>8.0f}{seconds / max(results[0][verb][0], 1e-9):>10.1f}")


if __name__ == "__main__":
    main()
