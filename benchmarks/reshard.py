"""Time saving and loading a synthetic model under several layouts on gloo ranks, against `cp` of the same bytes.

Every pair saves under one layout and loads under the other, parameters and optimizer state (14 bytes per parameter in
bf16). A save includes hashing and reading back; a load includes checking every hash. Peak memory is that of the largest
rank; it contains the model, gradients and optimizer (18 bytes per parameter over the ranks) and about 0.5 GiB of imports.

Example: python benchmarks/reshard.py --scratch /tmp/reshard --size 0.1b
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {  # hidden, ffn, layers, heads, groups, vocabulary
    "tiny": (256, 768, 4, 8, 4, 8000),
    "0.1b": (768, 2048, 12, 12, 4, 32000),
    "0.5b": (1024, 4096, 24, 16, 8, 32000),
    "1b": (2048, 8192, 16, 32, 8, 32000),
}
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = {  # ranks, settings
    "1": (1, {}),
    "TP2": (2, {TP: 2, "sequence_parallel": True}),
    "PP2": (2, {PP: 2}),
    "DP2": (2, {}),
    "PP3": (3, {PP: 3}),
    "TP2 PP2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
}
PAIRS = (("TP2", "PP2"), ("PP2", "TP2"), ("DP2", "TP2"), ("TP2 PP2", "DP2"), ("1", "TP2 PP2"), ("PP2", "PP3"))


def main() -> None:
    """Run every pair, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder to work in; needs three checkpoints' room")
    parser.add_argument("--size", choices=SIZES, default="0.1b")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), metavar="N", help="only the first N pairs")
    parser.add_argument("--rank", nargs=3, metavar=("WHAT", "LAYOUT", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(*arguments.rank, arguments.scratch)
        return
    scratch = arguments.scratch
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    print(f"{arguments.size}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| save | load | GB | cp s | save s | GB/s | load s | GB/s | peak GiB save | load |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for left, right in PAIRS[: arguments.pairs]:
        shutil.rmtree(scratch / "checkpoints", ignore_errors=True)
        saved = run_ranks(scratch, "save", left, arguments.size)
        (folder,) = (scratch / "checkpoints").glob("iter_*")
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
        os.sync()
        started = time.monotonic()
        subprocess.run(["cp", "-r", folder, scratch / "copy"], check=True)
        os.sync()
        copied = time.monotonic() - started
        shutil.rmtree(scratch / "copy")
        loaded = run_ranks(scratch, "load", right, arguments.size)
        print(
            f"| {left} | {right} | {size:.2f} | {copied:.1f} | {saved['seconds']:.1f} | {size / saved['seconds']:.2f} | "
            f"{loaded['seconds']:.1f} | {size / loaded['seconds']:.2f} | {saved['peak']:.2f} | {loaded['peak']:.2f} |",
            flush=True,
        )
    shutil.rmtree(scratch)


def run_ranks(scratch: Path, what: str, layout: str, size: str) -> dict[str, float]:
    """Start the ranks of a layout; return the longest time and the largest peak memory of one rank in GiB."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = LAYOUTS[layout][0]
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--scratch", scratch, "--rank", what, layout, size],
            env={"OMP_NUM_THREADS": "1", **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=(scratch / f"rank{rank}.log").open("w"),
        )
        for rank in range(world)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{what} under {layout} failed: see {scratch}/rank*.log")
    results = [json.loads((scratch / f"{what}{rank}.json").read_text()) for rank in range(world)]
    return {name: max(result[name] for result in results) for name in ("seconds", "peak")}


def run_rank(what: str, layout: str, size: str, scratch: Path) -> None:
    """Save random weights and moments, or load them, on this rank; write time and peak memory."""
    import torch

    from megatron_cpt.checkpoint.torch_dist.mcore import verify_checkpoint
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel, on_rank_0
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.state.checkpointing import load_checkpoint, save_checkpoint

    config = run_config(size, LAYOUTS[layout][1])
    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    torch.distributed.barrier()
    root, started = scratch / "checkpoints", time.monotonic()
    if what == "save":
        manifest = {"iteration": 1, "content": "full", "model": dataclasses.asdict(config.model)}
        save_checkpoint(root, 1, model, optimizer, manifest)
        os.sync()
    else:
        on_rank_0(lambda: verify_checkpoint(root / "iter_0000001", "full") and None)
        load_checkpoint(root / "iter_0000001", model, optimizer)
    torch.distributed.barrier()
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (scratch / f"{what}{os.environ['RANK']}.json").write_text(json.dumps({"seconds": seconds, "peak": peak}))
    finish_parallel()


def run_config(size: str, layout: dict[str, object]) -> object:
    """Return the configuration of a synthetic bf16 model under a layout."""
    from megatron_cpt.config.settings.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig

    hidden, ffn, layers, heads, groups, vocabulary = SIZES[size]
    if layout.get(PP) == 3:  # the other stages share what the first one leaves
        layout = {**layout, "num_layers_in_first_pipeline_stage": layers - 2 * (layers // 3)}
    return RunConfig(
        task="bench",
        params=size,
        size="one",
        model=ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
            vocab_size=vocabulary,
            max_position_embeddings=512,
        ),
        parallel=ParallelConfig(**layout),
        training=TrainingConfig(
            seq_length=512, micro_batch_size=1, global_batch_size=12, train_iters=1, precision="bf16"
        ),
    )


if __name__ == "__main__":
    main()
