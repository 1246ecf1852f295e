"""Time conversions and soups of a synthetic Llama against `cp` of the same bytes, with peak memory.

Each step runs in a process of its own, whose peak resident memory is reported (it contains about 0.25 GiB of torch).

Example: python benchmarks/convert.py --scratch /tmp/bench --size 1b --soup 7 --mergekit
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {  # hidden, ffn, layers, heads, groups, vocabulary
    "0.5b": (1024, 4096, 24, 16, 8, 32000),
    "1b": (2048, 8192, 16, 32, 8, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def main() -> None:
    """Make a model, run every step, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder to work in; needs three models' room")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--soup", type=int, default=0, metavar="K", help="average K models (hard links to one)")
    parser.add_argument("--mergekit", action="store_true", help="let mergekit average them too")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step, arguments.workers)
        return
    scratch = arguments.scratch
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    needed, free = 3 * 2.1 * num_parameters(SIZES[arguments.size]), shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(f"{scratch}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed for three models.")
    make_model(scratch / "hf", SIZES[arguments.size])
    size = sum(file.stat().st_size for file in (scratch / "hf").iterdir())
    steps = [
        ("cp", ["cp", "-r", scratch / "hf", scratch / "copy"]),
        ("hf-to-mcore", step(arguments, "to-mcore", scratch / "hf", scratch / "mcore")),
        ("mcore-to-hf", step(arguments, "to-hf", scratch / "mcore", scratch / "back")),
    ]
    inputs = [scratch / f"soup{number}" for number in range(arguments.soup)]
    for path in inputs:
        shutil.copytree(scratch / "hf", path, copy_function=os.link)
    if inputs:
        steps.append((f"average of {len(inputs)}", step(arguments, "average", scratch / "ours", *inputs)))
    if inputs and arguments.mergekit:
        steps.append((f"mergekit linear of {len(inputs)}", step(arguments, "mergekit", scratch / "theirs", *inputs)))
    print(f"{arguments.size}: {size / 1e9:.2f} GB, {arguments.workers} workers, load {os.getloadavg()[0]:.1f}\n")
    print("| step | seconds | GB/s of output | peak GiB |\n|---|---|---|---|")
    for name, command in steps:
        os.sync()
        started = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()
        seconds = time.monotonic() - started
        if status:
            raise SystemExit(f"{name} failed")
        peak = "" if name == "cp" else f"{usage.ru_maxrss / 2**20:.2f}"
        print(f"| {name} | {seconds:.1f} | {size / 1e9 / seconds:.2f} | {peak} |", flush=True)
        for output in ("copy", "ours", "theirs"):
            shutil.rmtree(scratch / output, ignore_errors=True)
    shutil.rmtree(scratch)


def num_parameters(size: tuple[int, ...]) -> int:
    """Return the parameters of a Llama with an output layer of its own."""
    hidden, ffn, layers, heads, groups, vocabulary = size
    attention = hidden * hidden * 2 * (heads + groups) // heads
    return layers * (attention + 3 * hidden * ffn) + 2 * vocabulary * hidden


def step(arguments: argparse.Namespace, *words: object) -> list[object]:
    """Return the command that runs one step in a process of its own."""
    common = [sys.executable, __file__, "--scratch", arguments.scratch, "--workers", arguments.workers]
    return [*common, "--step", *words]


def run_step(words: list[str], workers: int) -> None:
    """Run one step."""
    from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
    from megatron_cpt.checkpoint.soup.mean import average_hf
    from megatron_cpt.checkpoint.soup.mergekit import mergekit_config, run_mergekit

    name, first, *others = words
    paths = [Path(word) for word in others]
    if name == "to-mcore":
        hf_to_mcore(Path(first), paths[0], num_workers=workers)
    elif name == "to-hf":
        mcore_to_hf(Path(first), paths[0], num_workers=workers)
    elif name == "average":
        average_hf(paths, Path(first), num_workers=workers)
    else:
        run_mergekit(mergekit_config(paths), Path(first))


def make_model(path: Path, size: tuple[int, ...]) -> None:
    """Write a random bf16 Llama, one tensor in memory at a time."""
    import torch

    from megatron_cpt.checkpoint.huggingface.folder import OutputGroup, write_safetensors
    from megatron_cpt.checkpoint.huggingface.write_config import hf_config_from_model
    from megatron_cpt.checkpoint.mapping.units import family_of, units
    from megatron_cpt.config.settings.schema import ModelConfig

    hidden, ffn, layers, heads, groups, vocabulary = size
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=vocabulary,
    )
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hf_config_from_model(model, dtype="bfloat16")))
    tensors = [
        OutputGroup(((name, shape, torch.bfloat16),), lambda shape=shape: [torch.randn(shape, dtype=torch.bfloat16)])
        for unit in units(model, family_of("LlamaForCausalLM"))
        for name, shape in zip(unit.hf, unit.hf_shapes)
    ]
    write_safetensors(path, tensors, max_shard_bytes=2 * 10**9)


if __name__ == "__main__":
    main()
