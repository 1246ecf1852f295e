"""Measure counting, planning, ordering and index building: one shard of 10M documents, a list of 3,000 shards, 50B tokens.

Example: python benchmarks/blend.py
"""

import dataclasses
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from megatron_cpt.config.settings.schema import (
    CorpusConfig,
    DataConfig,
    ModelConfig,
    PathsConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_cpt.data.blend.order import blend_order
from megatron_cpt.data.blend.plan import plan_blend
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, read_index, write_index
from megatron_cpt.files import write_json
from megatron_cpt.train.samples.stage_samples import build_blended_samples

IDENTITY = {"name": "none", "hash": "0" * 32, "vocab_size": 65000, "eod_id": 0}
SEQ_LENGTH = 4096


@dataclasses.dataclass
class NoTokenizer:
    eod: int = 0
    vocab_size: None = None
    unique_identifiers: str = "none"


def main() -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        one_large_shard(Path(folder))
        many_shards(Path(folder))
    order_of_a_run()


def write_shard(prefix: Path, lengths: np.ndarray) -> int:
    """Write a shard whose tokens are a hole in the file; return how many there are."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = int(lengths.sum())
    with bin_path(prefix).open("wb") as file:
        file.truncate(tokens * 2)
    write_index(idx_path(prefix), np.dtype(np.uint16), lengths)
    write_json(manifest_path(prefix), {"documents": len(lengths), "tokens": tokens, "tokenizer": IDENTITY})
    return tokens


def one_large_shard(folder: Path) -> None:
    prefix = folder / "large"
    tokens = write_shard(prefix, np.random.default_rng(0).integers(50, 600, 10_000_000))
    with measured("count the tokens of 10M documents"):
        read_index(prefix)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=NoTokenizer(),
    )
    for epochs in (0.05, 1, 4):
        samples = int(tokens * epochs) // SEQ_LENGTH
        entry = DataEntry(prefix=str(prefix), tokens=samples * SEQ_LENGTH, corpus="c")
        cache = folder / f"cache_{epochs}"
        with measured(f"build the index of 10M documents for {epochs} epochs, {samples:,} samples"):
            build_blended_samples([entry], samples, config, cache)
        with measured("  load it"):
            build_blended_samples([entry], samples, config, cache)


def many_shards(folder: Path) -> None:
    rng = random.Random(0)
    for index in range(3000):
        write_shard(folder / f"D{index % 10}" / f"{index}_text_document", np.full(10, rng.randint(50, 400)))
    names = [f"D{index}" for index in range(10)]
    config = RunConfig(
        task="t",
        params="p",
        size="s",
        model=ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=100),
        training=TrainingConfig(seq_length=64, global_batch_size=4, train_tokens=4_000_000),
        data=DataConfig(mix=dict.fromkeys(names, 0.1), corpora={name: CorpusConfig(tokens=(name,)) for name in names}),
        paths=PathsConfig(data_dir=str(folder)),
    )
    with measured("plan a blend of 3,000 shards"):
        plan_blend(config)


def order_of_a_run() -> None:
    for samples, shards in ((12_000_000, 3000), (73_000_000, 800)):
        counts = [samples // shards] * shards
        corpora = [index % 3 for index in range(shards)]
        with measured(
            f"put {samples:,} samples ({samples * SEQ_LENGTH / 1e9:.0f}B tokens) of {shards:,} shards in order"
        ):
            blend_order(counts, corpora)


class measured:
    """Print the wall and processor seconds of a block, and the process's peak memory."""

    def __init__(self, label: str):
        self.label = label

    def __enter__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        sys.stdout.write(f"{self.label}: {wall:.2f} s ({cpu:.2f} s of processor), peak {peak:,} MB\n")


if __name__ == "__main__":
    main()
