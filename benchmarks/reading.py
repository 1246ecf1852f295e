"""Measure reading: milliseconds to make a sample's tokens, and how long a step waits for its batch with and without reading ahead.

    python benchmarks/reading.py                   # 64 samples of 4,096 tokens a step, steps that take 0.5 s elsewhere

The text is this package's source, repeated; files are in the page cache. A step is a sleep, so that its core is free for
the thread that reads: on a GPU it is. Numbers are medians over the steps after the first.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SENTINELS = ("<|prefix|>", "<|middle|>", "<|suffix|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="samples of a rank in a step (64)")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a sample (4096)")
    parser.add_argument("--step-seconds", type=float, default=0.5, help="what a step takes besides reading (0.5)")
    parser.add_argument("--steps", type=int, default=8, help="steps per measurement (8)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="reading-benchmark-") as folder:
        for name, fim_rate in (("plain", 0.0), ("fill in the middle, rate 0.5", 0.5)):
            measure(name, Path(folder), fim_rate, arguments)


def measure(name: str, folder: Path, fim_rate: float, arguments: argparse.Namespace) -> None:
    """Print the time of a sample, and the wait of a step that reads itself and of one for which a thread reads."""
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.samples.prefetch import Prefetch

    config, dataset, eod_id = build(folder, fim_rate, arguments)
    initialize_parallel(config)
    read = reader(config, dataset, eod_id)
    steps = range(1, arguments.steps + 1)
    own = [timed(lambda step=step: read(step)) for step in steps]
    waits = []
    with Prefetch(read, steps) as ahead:
        for step in steps:
            waits.append(timed(lambda step=step: ahead.get(step)))
            time.sleep(arguments.step_seconds)
    finish_parallel()
    before, after = statistics.median(own[1:]), statistics.median(waits[1:])
    print(
        f"{name}: {before / arguments.samples * 1000:.2f} ms a sample; a step of {arguments.samples} samples waits "
        f"{before * 1000:.1f} ms when it reads itself, {after * 1000:.2f} ms when a thread reads ahead"
    )


def build(folder: Path, fim_rate: float, arguments: argparse.Namespace):
    """Return a configuration, its samples and the end-of-document id; the shard is made once."""
    from tokenizers import ByteLevelBPETokenizer

    from megatron_cpt.config.settings.schema import DataConfig, ModelConfig, PathsConfig, RunConfig, TrainingConfig
    from megatron_cpt.data.blend.stage_order import StageOrder
    from megatron_cpt.data.lists.entry import DataEntry
    from megatron_cpt.data.tokenize.driver import tokenize
    from megatron_cpt.data.tokenizer.interface import load_tokenizer
    from megatron_cpt.files import write_json
    from megatron_cpt.train.samples.batches import DatasetTokenizer, build_train_dataset

    texts = [path.read_text() for path in sorted((ROOT / "megatron_cpt").rglob("*.py"))]
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").mkdir()
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(
            texts, vocab_size=8000, special_tokens=["<|endoftext|>", *SENTINELS], show_progress=False
        )
        trained.save(str(folder / "tokenizer" / "tokenizer.json"))
        import orjson

        lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)
        needed = arguments.samples * arguments.seq_length * arguments.steps * 5
        (folder / "text.jsonl").write_bytes(lines * (needed // len(lines) + 1))
        tokenize([folder / "text.jsonl"], folder / "tokenizer", output_prefix=folder / "text", workers=1)
        write_json(folder / "tokenizer" / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    prefix, middle, suffix = SENTINELS
    model = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=8000)
    config = RunConfig(
        task="reading", params="none", size="short",
        model=dataclasses.replace(model, max_position_embeddings=arguments.seq_length),
        training=TrainingConfig(
            seq_length=arguments.seq_length, micro_batch_size=4, global_batch_size=arguments.samples,
            train_iters=arguments.steps,
        ),
        data=DataConfig(
            tokenizer="tokenizer", fim_rate=fim_rate, fim_prefix_token=prefix, fim_middle_token=middle,
            fim_suffix_token=suffix,
        ),
        paths=PathsConfig(data_dir=str(folder)),
    )  # fmt: skip
    tokenizer = load_tokenizer(folder / "tokenizer")
    total = arguments.samples * arguments.steps * arguments.seq_length
    entry = DataEntry(prefix=str(folder / "text_text_document"), tokens=total, corpus="text")
    count = arguments.samples * arguments.steps
    order = StageOrder(entries=(entry,), num_samples=count, count=count, seq_length=arguments.seq_length, seed=1)
    identity = DatasetTokenizer(tokenizer.eod_id, tokenizer.vocab_size, tokenizer.identity)
    return config, build_train_dataset(config, order, identity, folder / "cache"), tokenizer.eod_id


def reader(config, dataset, eod_id):
    """Return what reads the batches of a step."""
    from megatron_cpt.train.samples.batches import microbatches

    size = config.training.global_batch_size
    return lambda step: microbatches(dataset, (step - 1) * size, size, config, eod_id)


def timed(function) -> float:
    """Return the seconds a call takes."""
    started = time.monotonic()
    function()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
