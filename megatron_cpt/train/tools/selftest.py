"""Small computations that show whether an installation works: `megatron-cpt doctor --deep`.

Each runs in a process of its own, because what is wrong with an installation often ends the process. A step is
`python -m megatron_cpt.train.tools.selftest NAME`; it prints what it found and exits 0, or fails with its reason last.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import megatron_cpt
from megatron_cpt.launch.doctor import Finding

TIMEOUT_SECONDS = 300
REMEDY = "installers/install.sh on a fresh folder; or correct what the line above names"

PARAMS = """
model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2,
        vocab_size: 512, max_position_embeddings: 64}
training: {seq_length: 64, micro_batch_size: 2, global_batch_size: 4, precision: fp32}
optimizer: {lr: 1e-2}
"""
TASK = """
data:
  tokenizer: tokenizer
  corpora: {D0: {tokens: [D0_text_document]}}
  mix: {D0: 1.0}
sizes: {tiny: {training: {train_iters: 2}}}
"""


def run_selftest() -> list[Finding]:
    """Run every step and return a finding for each."""
    one_rank = [sys.executable, "-m", "megatron_cpt.train.tools.selftest"]
    two_ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [
        _finding("imports", [*one_rank, "imports"]),
        _finding("kernel", [*one_rank, "kernel"]),
        _finding("all-reduce", [*two_ranks, "-m", "megatron_cpt.train.tools.selftest", "all-reduce"]),
        _finding("pipeline", [*one_rank, "pipeline"]),
    ]


def _finding(what: str, command: list[str]) -> Finding:
    started = time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return Finding("problem", what, f"not done after {TIMEOUT_SECONDS} s", REMEDY)
    if answer.returncode:
        lines = [line for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
        reasons = [line for line in lines if re.match(r"megatron-cpt \w+: |[\w.]*(Error|Exception): ", line)]
        reason = next(iter(reasons or lines[-1:]), "no output")
        return Finding("problem", what, f"exit code {answer.returncode}: {reason.strip()[:300]}", REMEDY)
    return Finding("ok", what, f"{answer.stdout.strip().splitlines()[-1]} ({time.monotonic() - started:.0f} s)")


def imports() -> str:
    """Import what a run imports and return the versions."""
    import megatron.core
    import mergekit  # noqa: F401
    import torch
    import transformers
    from megatron.core.datasets import helpers_cpp  # noqa: F401  (the compiled index builder)

    return (
        f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, transformers {transformers.__version__}"
    )


def kernel() -> str:
    """Multiply matrices on every GPU, or on the CPU, and compare with double precision."""
    import torch

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = left @ right
    for device in devices:
        product = (left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16)).cpu().double()
        error = ((product - expected).norm() / expected.norm()).item()
        if not error < 0.02:
            raise RuntimeError(f"{device}: a bf16 product differs by {error:.3g} from double precision, 0.02 is usual")
    name = torch.cuda.get_device_name(0) if devices[0].type == "cuda" else "cpu"
    return f"bf16 product right on {len(devices)} x {name}"


def all_reduce() -> str:
    """Sum a number over two ranks, with NCCL where there are two GPUs, else with gloo."""
    import torch

    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    torch.distributed.init_process_group(backend)
    value = torch.tensor([torch.distributed.get_rank() + 1.0], device=device)
    torch.distributed.all_reduce(value)
    torch.distributed.destroy_process_group()
    if value.item() != 3:
        raise RuntimeError(f"{backend}: ranks 1 and 2 sum to {value.item()}")
    return f"2 ranks over {backend}"


def pipeline() -> str:
    """Tokenize a few documents, train two steps on them, and return the losses."""
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        root = Path(folder)
        _write_inputs(root)
        _run_verb(
            root, "tokenize", "--input", "data/D0.jsonl", "--tokenizer", "data/tokenizer", "--output-prefix", "data/D0"
        )
        _run_verb(root, "train", "--task", "task", "--params", "params.yaml", "--size", "tiny")
        (metrics,) = root.glob("runs/**/metrics.jsonl")
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        end = records[-1]
        if end["kind"] != "end" or end["reason"] != "finished":
            raise RuntimeError(f"the training ended with {end}")
    return "tokenized, trained 2 iterations, saved a checkpoint"


def _write_inputs(root: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    words = random.Random(0)
    texts = [" ".join(f"word{words.randrange(60)}" for _ in range(200)) for _ in range(40)]
    (root / "data" / "tokenizer").mkdir(parents=True)
    (root / "task").mkdir()
    (root / "data" / "D0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=512, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(root / "data" / "tokenizer" / "tokenizer.json"))
    (root / "params.yaml").write_text(PARAMS)
    (root / "task" / "task.yaml").write_text(TASK)


def _run_verb(root: Path, *arguments: str) -> None:
    path = os.pathsep.join(filter(None, [str(Path(megatron_cpt.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "megatron_cpt", *arguments]
    subprocess.run(command, cwd=root, check=True, env={**os.environ, "PYTHONPATH": path})


STEPS: dict[str, Callable[[], str]] = {
    "imports": imports,
    "kernel": kernel,
    "all-reduce": all_reduce,
    "pipeline": pipeline,
}

if __name__ == "__main__":
    sys.stdout.write(STEPS[sys.argv[1]]() + "\n")
