"""A stage on instruction data from start to end: packs, epochs, held-out conversations, completion data, noise."""

import json
from pathlib import Path

import numpy as np

from megatron_cpt.checkpoint.mcore import read_manifest
from megatron_cpt.data.masked import LEARNED, PIECE, write_masked_shard
from megatron_cpt.data.tokenizer import load_tokenizer
from tests.train.conftest import write_experiment
from tests.train.test_loop import run_path

SEQ = 32


def instruction_stage(task: str, overrides: tuple[str, ...]) -> str:
    from megatron_cpt.config.load import load_config
    from megatron_cpt.data.epochs import with_iterations
    from megatron_cpt.train.loop import train

    return train(with_iterations(load_config(Path(task), "tiny", "short", "base", overrides=overrides)))


def packs(count: int, eod: int, seed: int):
    """Return (ids, mask) of packs: a question that is not learned, an answer that is, and filling."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        ids = np.append(rng.integers(eod + 1, 400, SEQ - 4), [eod] * 4)
        mask = np.zeros(SEQ, dtype=np.uint8)
        mask[10 : SEQ - 3] = LEARNED
        mask[0] = mask[SEQ - 3] = PIECE
        yield ids, mask


def test_instruction_data_trains_for_epochs_beside_completion_data(ranks, tmp_path, experiment_data):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("tokenizer", "tokens"):
        (data / name).symlink_to(experiment_data / name)
    tokenizer = load_tokenizer(data / "tokenizer")
    for name, count in (("chat", 80), ("held_out", 10)):
        (data / "chat").mkdir(exist_ok=True)
        write_masked_shard(
            data / "chat" / name,
            packs(count, tokenizer.eod_id, count),
            np.dtype(np.uint16),
            tokenizer.identity,
            packed_seq_length=SEQ,
        )
    task = write_experiment(tmp_path, data)
    overrides = (
        "data.corpora={chat: {tokens: [chat/chat], validation: [chat/held_out]}}",
        "data.mix={chat: 0.8, D0: 0.2}",
        "training.train_epochs=1",
        "training.neftune_alpha=5",
        "evaluation.eval_interval=6",
    )
    assert ranks.run(instruction_stage, 1, str(task), overrides) == ["finished"]
    run = run_path(task, "base")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["kind"] == "validation" and line["corpus"] == "chat"]
    assert [line["iteration"] for line in held_out] == [0, 6, 12]
    assert all(line["loss"] > 0 and "bits_per_byte" not in line for line in held_out)
    assert all("bits_per_byte" in line for line in lines if line["kind"] == "validation" and line["corpus"] == "D0")
    manifest = read_manifest(run / "checkpoints" / "iter_0000012")  # 80 packs and 20 others are 12.5 batches of 8
    assert manifest["tokens_per_corpus"] == {"chat": 76 * SEQ, "D0": 20 * SEQ}
    resolved = (run / "config.yaml").read_text()
    assert "train_iters: 12  # 1 epochs of chat, 2,560 tokens (0.8 of the mix), from command line" in resolved
