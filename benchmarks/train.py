"""Measure training: our loop against a plain PyTorch loop of the same model and against megatron-core's own attention.

    python benchmarks/train.py                     # on CPU: ratios, start-up, share of a step outside the model
    python benchmarks/train.py --gpu               # on one GPU: 1B and an 8B-shaped model, bf16, sequence 4096
    python benchmarks/train.py --gpu --compile     # with torch.compile of the layers (ours) and the model (plain)

Ours is the whole program, `megatron-cpt train` in a process of its own, with data, schedule, logging and metrics; each
number comes from its `metrics.jsonl`. The others run in processes of their own too. Variants take turns; every number is the
median over `--runs` of the median over the steps after the first two. Ratios are of tokens per second, above 1 where ours is
faster. `ours` reads plain causal samples as the others do; `isolated` is ours with documents that do not see each other.

On a GPU nothing is saved at the end (17 GB a run), `unfused` recomputes its attention in the backward pass (its scores do not
fit otherwise), and a variant that runs out of memory is left out with a line that says so.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.launch.planning.model_size import num_parameters
from megatron_cpt.log import format_bytes, format_count

ROOT = Path(__file__).resolve().parent.parent
CPU_SHAPE = {
    "num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1408, "num_attention_heads": 8, "num_query_groups": 4,
    "vocab_size": 8192, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
TINY_SHAPE = CPU_SHAPE | {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 512}
VARIANTS = ("ours", "isolated", "plain", "unfused")
IGNORED_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the part that needs a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile, GPU only")
    parser.add_argument("--tiny", action="store_true", help="a model of no interest, to see that everything runs")
    parser.add_argument("--runs", type=int, default=3, help="processes per variant (3)")
    parser.add_argument("--steps", type=int, default=12, help="steps per process (12)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--layers", type=int, default=8, help="GPU: layers of the 8B-shaped model (8)")
    parser.add_argument("--scratch", type=Path, help="folder for runs (a temporary one)")
    parser.add_argument("--patched", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.patched:
        return run_patched(arguments.patched[0], arguments.patched[1:])
    if arguments.gpu and not has_gpu():
        sys.exit("no GPU here: the --gpu part was not measured. Run it on a machine with one.")
    if arguments.compile and not arguments.gpu:
        sys.exit("--compile needs --gpu: on CPU megatron-core runs without compilation.")
    with tempfile.TemporaryDirectory(prefix="train-benchmark-", dir=arguments.scratch) as folder:
        for name, case in cases(arguments).items():
            measure(name, case, Path(folder) / name, arguments)
    return None


def has_gpu() -> bool:
    """Return whether torch sees a GPU, asked in another process so that this one stays light."""
    command = [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command).returncode == 0


def cases(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the models to measure with their batches."""
    if not arguments.gpu:
        if arguments.tiny:
            return {"tiny": case(TINY_SHAPE, seq_length=64, micro=2, batch=4, precision="fp32")}
        return {"cpu-32m": case(CPU_SHAPE, seq_length=512, micro=2, batch=4, precision="fp32")}
    if arguments.tiny:
        return {"tiny": case(TINY_SHAPE, seq_length=64, micro=2, batch=4, precision="bf16")}
    known = {
        name: yaml.safe_load((ROOT / "params" / f"{name}.yaml").read_text())["model"]
        for name in ("llama3-1b", "llama3-8b")
    }
    fields = (*CPU_SHAPE, "rotary_base")
    shapes = {name: {field: model[field] for field in fields} for name, model in known.items()}
    eight = shapes["llama3-8b"] | {"num_layers": arguments.layers}
    return {
        "llama-1b": case(shapes["llama3-1b"], seq_length=4096, micro=4, batch=32, precision="bf16"),
        f"llama-8b-shaped-{arguments.layers}-layers": case(eight, seq_length=4096, micro=2, batch=16, precision="bf16"),
    }


def case(shape: dict[str, Any], *, seq_length: int, micro: int, batch: int, precision: str) -> dict[str, Any]:
    """Return one model and its batch."""
    return {
        "shape": shape,
        "model": shape | {"max_position_embeddings": seq_length},
        "training": {
            "seq_length": seq_length,
            "micro_batch_size": micro,
            "global_batch_size": batch,
            "precision": precision,
        },
    }


def measure(name: str, case: dict[str, Any], folder: Path, arguments: argparse.Namespace) -> None:
    """Run every variant of a model in turn and print a table."""
    write_experiment(folder, case, arguments.steps)
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in arguments.variants}
    for run in range(arguments.runs):
        for variant in list(results):
            try:
                measured = (
                    run_plain(case, arguments)
                    if variant == "plain"
                    else run_ours(folder, case, variant, run, arguments)
                )
            except MemoryError:
                sys.stderr.write(f"{name} run {run} {variant}: out of memory, left out\n")
                del results[variant]
                continue
            results[variant].append(measured)
            sys.stderr.write(
                f"{name} run {run} {variant}: {statistics.median(measured['seconds']) * 1000:.1f} ms a step\n"
            )
    report(name, case, results, arguments)


def write_experiment(folder: Path, case: dict[str, Any], steps: int) -> None:
    """Write a tokenizer, a tokenized shard, a params file and a task."""
    from tokenizers import ByteLevelBPETokenizer

    chooser = random.Random(0)
    texts = [" ".join(f"word{chooser.randrange(60)}" for _ in range(chooser.randrange(100, 900))) for _ in range(1500)]
    (folder / "data" / "tokenizer").mkdir(parents=True)
    (folder / "task").mkdir()
    (folder / "data" / "D0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(folder / "data" / "tokenizer" / "tokenizer.json"))
    params = {
        "model": case["model"],
        "training": case["training"],
        "optimizer": {"lr": 1e-3},
    }
    task = {
        "data": {
            "tokenizer": "tokenizer", "corpora": {"D0": {"tokens": ["D0_text_document"]}}, "mix": {"D0": 1.0},
            "max_epochs": 1e6,
        },
        "checkpoint": {"save_interval": 10**9, "keep_last": 1},
        "logging": {"log_interval": 1},
        "sizes": {"short": {"training": {"train_iters": steps}}},
    }  # fmt: skip
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "task" / "task.yaml").write_text(yaml.safe_dump(task))
    command = ["tokenize", "--input", "data/D0.jsonl", "--tokenizer", "data/tokenizer", "--output-prefix", "data/D0"]
    subprocess.run(
        [sys.executable, "-m", "megatron_cpt", *command], cwd=folder, check=True, env=environment(), capture_output=True
    )


def environment() -> dict[str, str]:
    """Return the environment of a child: this checkout, and all cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(cores), **os.environ, "PYTHONPATH": str(ROOT)}


def check_answer(variant: str, answer: subprocess.CompletedProcess[str]) -> None:
    """End the benchmark where a process failed. Raises: MemoryError where the GPU had too little memory."""
    if answer.returncode and "OutOfMemoryError" in answer.stderr:
        raise MemoryError(variant)
    if answer.returncode:
        sys.exit(f"{variant}: exit code {answer.returncode}\n{answer.stdout[-3000:]}{answer.stderr[-3000:]}")


def run_ours(
    folder: Path, case: dict[str, Any], variant: str, run: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train with megatron-cpt and return what its metrics say."""
    runs = f"runs-{variant}-{run}"
    words = ["train", "--task", "task", "--params", "params.yaml", "--size", "short", f"paths.runs_dir={runs}"]
    words.append(f"data.reset_attention_mask={'true' if variant == 'isolated' else 'false'}")
    words += ["training.compile=true"] * arguments.compile
    if variant == "unfused" and arguments.gpu:
        words.append("parallel.recompute_granularity=selective")
    wanted = {"unfused": variant == "unfused", "unsaved": arguments.gpu}
    patches = [name for name, is_wanted in wanted.items() if is_wanted]
    program = (
        [str(ROOT / "benchmarks" / "train.py"), "--patched", "+".join(patches)] if patches else ["-m", "megatron_cpt"]
    )
    started = time.time()
    answer = subprocess.run(
        [sys.executable, *program, *words], cwd=folder, env=environment(), capture_output=True, text=True
    )
    check_answer(variant, answer)
    (metrics,) = (folder / runs).glob("**/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    measured = steps[IGNORED_STEPS:]
    shutil.rmtree(folder / runs)
    return {
        "seconds": [step["step_seconds"] for step in measured],
        "outside": [
            (step["step_seconds"] - step["forward_backward_seconds"] - step["optimizer_seconds"]) / step["step_seconds"]
            for step in measured
        ],
        "data": [step["data_seconds"] / step["step_seconds"] for step in measured],
        "losses": [step["loss"] for step in steps],
        "start_up": steps[0]["time"] - started,
        "first_step": steps[0]["step_seconds"],
        "peak_bytes": steps[-1]["memory_bytes"],
        "tflops": [step["tflops_per_gpu"] for step in measured],
        "mfu": [step["mfu"] for step in measured],
        "model": case["model"],
    }


def run_plain(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the plain loop and return what it printed, without the first steps."""
    training = {key: value for key, value in case["training"].items() if key != "precision"}
    description = training | {
        "shape": case["shape"],
        "steps": arguments.steps,
        "tokens": 300,
        "compile": arguments.compile,
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "train_plain.py"), json.dumps(description)]
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True)
    check_answer("plain", answer)
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result | {"seconds": result["seconds"][IGNORED_STEPS:]}


def run_patched(patches: str, words: list[str]) -> None:
    """Be `megatron-cpt` with megatron-core's own attention, or without checkpoints."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_cpt.cli import main as megatron_cpt
    from megatron_cpt.train.model import layer_spec
    from megatron_cpt.train.stage.saving import Saver

    if "unsaved" in patches:
        Saver.save = lambda *_, **__: None  # type: ignore[method-assign]
    if "unfused" in patches:
        layer_spec.SdpaCoreAttention = DotProductAttention  # type: ignore[misc]
    megatron_cpt(words)


def report(
    name: str, case: dict[str, Any], results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace
) -> None:
    """Print a table of medians, ratios to ours, and where ours spends what is not the model."""
    training = case["training"]
    tokens = training["global_batch_size"] * training["seq_length"]
    seconds = {variant: median_of_medians(runs, "seconds") for variant, runs in results.items()}
    print(
        f"\n{name}: {case['shape']}\n{training}, {arguments.runs} runs of {arguments.steps} steps, compile {arguments.compile}"
    )
    header = (
        "variant",
        "ms/step",
        "tokens/s",
        "ours is faster by",
        "TFLOP/s",
        "MFU",
        "peak memory",
        "first loss",
        "last loss",
    )
    print(" | ".join(header))
    reference = next((run for variant in ("ours", "isolated", "unfused") for run in results.get(variant, ())), None)
    if reference and "plain" in results:
        ours, plain = num_parameters(ModelConfig(**reference["model"])), results["plain"][0]["parameters"]
        if ours != plain:
            sys.exit(f"the plain model has {plain} parameters, ours {ours}: the comparison would mean nothing")
    for variant, runs in results.items():
        rate = tokens / seconds[variant]
        ratio = f"{seconds[variant] / seconds['ours']:.2f} x" if "ours" in seconds else ""
        tflops = flops(reference, training["seq_length"]) * rate / 1e12 if reference else float("nan")
        known_mfu = reference and reference["mfu"][0] and reference["tflops"][0] / reference["mfu"][0]
        mfu = f"{tflops / known_mfu:.1%}" if known_mfu else "-"
        peak = format_bytes(statistics.median(run["peak_bytes"] for run in runs))
        losses = runs[0]["losses"]
        print(
            f"{variant} | {seconds[variant] * 1000:.1f} | {format_count(rate)} | {ratio} | {tflops:.3g} | {mfu} | {peak} | "
            f"{losses[0]:.3f} | {losses[-1]:.3f}"
        )
    for variant in ("ours", "isolated"):
        if variant in results:
            outside, data = (median_of_medians(results[variant], key) for key in ("outside", "data"))
            start = statistics.median(run["start_up"] for run in results[variant])
            first = statistics.median(run["first_step"] for run in results[variant])
            print(
                f"{variant}: {outside:.2%} of a step outside forward, backward and optimizer ({data:.2%} building batches); "
                f"{start:.1f} s from command to the end of the first step ({first:.1f} s of it the step)"
            )


def flops(reference: dict[str, Any], seq_length: int) -> float:
    """Return the floating-point operations of a token by the formula of `train/watch/metrics.py`."""
    from megatron_cpt.train.watch.metrics import flops_per_token

    return flops_per_token(ModelConfig(**reference["model"]), seq_length)


def median_of_medians(runs: list[dict[str, Any]], key: str) -> float:
    """Return the median over runs of each run's median."""
    return statistics.median(statistics.median(run[key]) for run in runs)


if __name__ == "__main__":
    main()
