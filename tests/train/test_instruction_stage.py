"""A stage on instruction data from start to end: packs, epochs, held-out conversations, completion data, noise."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.checkpoint.convert.choices import ExportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import mcore_to_hf
from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest
from megatron_cpt.cli import main
from megatron_cpt.data.shards.indexed import read_index, read_tokens
from megatron_cpt.data.shards.masked import LEARNED, PIECE, write_masked_shard
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from tests.tolerances import assert_fp32_rounding
from tests.train.conftest import write_experiment
from tests.train.test_loop import records, run_path

SEQ = 32


def instruction_stage(task: str, overrides: tuple[str, ...]) -> str:
    from megatron_cpt.config.loading.resolve import load_config
    from megatron_cpt.data.blend.epochs import with_iterations
    from megatron_cpt.train.stage.loop import train

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


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory, experiment_data):
    """Return a data folder with packed conversations: several turns, some cut, a system prompt, long and short ones."""
    from tokenizers import Tokenizer

    root = tmp_path_factory.mktemp("chat") / "data"
    (root / "tokenizer").mkdir(parents=True)
    (root / "tokens").symlink_to(experiment_data / "tokens")
    tokenizer = Tokenizer.from_file(str(experiment_data / "tokenizer" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(root / "tokenizer" / "tokenizer.json"))
    shutil.copy(experiment_data / "tokenizer" / "tokenizer_config.json", root / "tokenizer")
    chooser = random.Random(1)

    def words(most: int) -> str:
        return " ".join(
            chooser.choices(["the", "model", "learns", "slowly", "from", "text"], k=chooser.randint(1, most))
        )

    with (root / "chat.jsonl").open("w") as file:
        for number in range(60):
            turns = [{"role": "system", "content": words(3)}] if number % 3 == 0 else []
            for _ in range(chooser.randint(1, 3)):
                turns += [{"role": "user", "content": words(8)}, {"role": "assistant", "content": words(12)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    words_of_verb = [
        "data",
        "prepare-chat",
        "--input",
        str(root / "chat.jsonl"),
        "--tokenizer",
        str(root / "tokenizer"),
    ]
    words_of_verb += ["--template", "chatml", "--output-prefix", str(root / "chat"), "--pack", "64", "--max-packs", "8"]
    with pytest.raises(SystemExit) as ended:
        main([*words_of_verb, "--workers", "1"])
    assert ended.value.code == 0
    return root


def loss_by_hand(folder: Path, data: Path) -> float:
    """Return the mean loss of a Hugging Face model over what assistants say and the tokens that end their turns.

    The masks of the shard are not looked at: conversations are told apart by their end, turns by their control tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(data / "tokenizer")
    start, stop = tokenizer.backend.token_to_id("<|im_start|>"), tokenizer.backend.token_to_id("<|im_end|>")
    head = tokenizer.encode_batch(["<|im_start|>assistant\n"])[0]
    ids = read_tokens(read_index(data / "chat_chat_document")).astype(int)
    assert len(ids) == 8 * 64
    losses = []
    for pack in ids.reshape(8, 64):
        for conversation in np.split(pack, np.flatnonzero(pack == tokenizer.eod_id) + 1):
            if len(conversation) < 2:
                continue
            assert conversation[0] == start and conversation[-2:].tolist() != [stop, stop]
            with torch.no_grad():
                logits = model(torch.tensor(conversation[None])).logits[0, :-1]
            of_next = torch.nn.functional.cross_entropy(logits, torch.tensor(conversation[1:]), reduction="none")
            is_said = False
            for place in range(1, len(conversation)):
                if conversation[place - len(head) : place].tolist() == head:
                    is_said = True
                if is_said:
                    losses.append(float(of_next[place - 1]))
                is_said = is_said and conversation[place] != stop
    return float(np.mean(losses))


LAYOUTS = {
    "one rank": (1, ()),
    "DP2": (2, ("launch.gpus_per_node=2",)),
    "CP2": (2, ("launch.gpus_per_node=2", "parallel.context_parallel_size=2")),
}


def test_the_loss_is_the_mean_over_what_assistants_say_under_every_layout(ranks, tmp_path, chat_data):
    found = {}
    for name, (count, layout) in LAYOUTS.items():
        (tmp_path / name).mkdir()
        task = write_experiment(tmp_path / name, chat_data)
        overrides = (
            "data.corpora={chat: {tokens: [chat_chat_document]}}",
            "data.mix={chat: 1.0}",
            "training.seq_length=64",
            "training.micro_batch_size=1",
            "training.train_iters=1",
            "schedule.lr_warmup=1",
            "model.vocab_size=402",
            *layout,
        )
        assert ranks.run(instruction_stage, count, str(task), overrides) == ["finished"] * count
        (record,) = records(task, "base", "train")
        assert record["lr"] == 0.0  # the first step of a warm-up: the model that is saved is the one that was measured
        found[name] = record["loss"]
    exported = mcore_to_hf(
        run_path(task, "base") / "checkpoints" / "iter_0000001", tmp_path / "hf", options=ExportChoices(tokenizer=None)
    )
    assert_fp32_rounding(list(found.values()), [loss_by_hand(exported, chat_data)] * 3)
