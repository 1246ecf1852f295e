"""What the commands of the guides find: documents, tokens, a base model, a task with two trained stages, schedulers.

The names are those of a real experiment (`tasks/ja`, `llama3-8b`, `50B`); the model behind them has two layers and a stage
twenty iterations. The schedulers take every job, say that it is queued, and never start it: `tests/cluster` runs them.
"""

import json
import os
import random
import shutil
from pathlib import Path

WORDS = {
    "D0": "the a model learns text from books and letters slowly with care in long plain sentences".split(),
    "D1": "def return import for in range print self None True False lambda yield class pass while".split(),
}
PARAMS = """\
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
        vocab_size: 400, max_position_embeddings: 64, rotary_base: 500000}
training: {seq_length: 32, micro_batch_size: 2, global_batch_size: 8, precision: fp32}
optimizer: {lr: 5e-3, min_lr: 5e-5}
logging: {log_interval: 1, tensorboard: false}
"""
TASK = """\
description: What the guides speak of.
paths: {runs_dir: runs, data_dir: data}
data:
  tokenizer: tokenizer
  buffer: buffer.yaml
  max_epochs: 100
  corpora:
    D0:
      documents: [D0/train.jsonl.zst]
      tokens: [tokens/D0_text_document]
      validation: [tokens/D0.validation_text_document]
      validation_documents: [D0/validation.jsonl.zst]
    D1:
      documents: [D1/train.jsonl.zst]
      tokens: [tokens/D1_text_document]
      validation: [tokens/D1.validation_text_document]
      validation_documents: [D1/validation.jsonl.zst]
evaluation: {eval_interval: 5, eval_iters: 2}
checkpoint: {save_interval: 10}
sizes:
  50B: {training: {train_iters: 20}}
variants:
  base:
    data: {mix: {D0: 1.0}}
    init: {from_path: ../models/base}
    schedule: {lr_decay_style: WSD, lr_warmup: 2, lr_cooldown: 8}
  main:
    data: {mix: {D0: 0.1, D1: 0.9}}
    init: {from_path: "variant:base", load: full}
    schedule: {lr_decay_style: WSD, lr_cooldown: 0.2}
"""
SCHEDULER = """#!/usr/bin/env bash
# Takes every job and never starts it.
case "$(basename "$0")" in
  sbatch) echo $((100 + RANDOM % 800)) ;;
  qsub) echo "$((100 + RANDOM % 800)).pbs1" ;;
  squeue) for id in $(grep -o 'jobs=[0-9,]*' <<<"$*" | tr -c '0-9' ' '); do echo "$id $id N/A PENDING 0 Priority"; done ;;
  qstat) echo "{\"Jobs\": {\"${!#}\": {\"job_state\": \"Q\", \"comment\": \"waits\"}}}" ;;
esac
"""


def documents(corpus: str, count: int, seed: int) -> list[str]:
    """Return documents of random words of a corpus."""
    chooser = random.Random(f"{corpus}{seed}")
    return [" ".join(chooser.choices(WORDS[corpus], k=chooser.randrange(20, 120))) for _ in range(count)]


def build_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer of 400 tokens and write it as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents("D0", 50, 0) + documents("D1", 50, 0), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def build_base(folder: Path, tokenizer: Path) -> None:
    """Write a random Llama of two layers with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def write_chat(path: Path) -> None:
    """Write conversations in two languages, a bad one among them."""
    records: list[dict] = [
        {
            "conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "conversation_id": f"{'translation' if number % 10 == 9 else 'talk'}_{number}",
            "lang": "eu" if number % 2 else "en",
        }
        for number, (question, answer) in enumerate(zip(documents("D0", 60, 5), documents("D1", 60, 5)))
    ]
    records[3]["conversations"][1]["content"] = ""
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def build_scratch(root: Path) -> None:
    """Write everything but the trained stages into `root`."""
    import zstandard

    def write(path: str, texts: list[str], **fields: object) -> None:
        lines = "".join(json.dumps({"text": text, **fields}) + "\n" for text in texts).encode()
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(zstandard.compress(lines) if path.endswith(".zst") else lines)

    from megatron_cpt.data.tokenize.driver import tokenize

    build_tokenizer(root / "data/tokenizer")
    build_base(root / "models/base", root / "data/tokenizer")
    for corpus in WORDS:
        for part, count, seed in (("train", 300, 1), ("validation", 15, 2)):
            write(f"data/{corpus}/{part}.jsonl.zst", documents(corpus, count, seed))
            name = corpus if part == "train" else f"{corpus}.validation"
            tokenize(
                [root / f"data/{corpus}/{part}.jsonl.zst"],
                root / "data/tokenizer",
                output_prefix=root / "data/tokens" / name,
            )
    write("raw/news/a.jsonl", documents("D0", 40, 3), score=4.0)
    write("raw/web/b.jsonl.zst", documents("D1", 40, 4) + documents("D1", 10, 4), score=2.0)
    write(
        "eval/gsm8k.jsonl",
        documents("D0", 3, 3),
        question="how many plain sentences of which length are in a long book of letters",
    )
    for corpus in WORDS:
        for part in ("", ".validation"):
            write(f"runs/demo/data/{corpus}{part}.jsonl.zst", documents(corpus, 5, 1))
    shutil.copytree(root / "data/tokenizer", root / "runs/demo/data/tokenizer")
    (root / "runs/demo/models/base-mcore").mkdir(parents=True)
    (root / "runs/demo/models/base-mcore/latest_checkpointed_iteration.txt").write_text("release")
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    write("raw/chat/c.jsonl", ["unused"] * 5, conversations=messages, conversation_id="x_1")
    write_conversations(root / "conversations")
    task = root / "tasks/ja"
    (task / "params").mkdir(parents=True)
    (task / "task.yaml").write_text(TASK)
    (task / "params/llama3-8b.yaml").write_text(PARAMS)
    commands = root / ".bin"
    commands.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "qsub", "qstat", "qselect", "qdel"):
        (commands / name).write_text(SCHEDULER)
        (commands / name).chmod(0o755)


def write_conversations(folder: Path) -> None:
    """Write instruction data of two languages, with duplicates of prompts and ids that are left out."""
    folder.mkdir()
    for lang, corpus in (("eu", "D0"), ("en", "D1")):
        questions, answers = documents(corpus, 30, 5), documents(corpus, 30, 6)
        records = [
            {
                "conversation_id": f"{'translation' if number % 10 == 0 else 'x'}_{number}",
                "lang": lang,
                "conversations": [
                    {"role": "user", "content": " ".join(question.split()[:8])},
                    {"role": "assistant", "content": " ".join(answer.split()[:12])},
                ],
            }
            for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
        ]
        lines = [json.dumps(record) + "\n" for record in [*records, records[1]]]
        (folder / f"{lang}.jsonl").write_text("".join(lines))


def train_stage(root: str, variant: str) -> str:
    """Train a stage of the scratch on this rank; return why it ended."""
    from megatron_cpt.config.loading.resolve import load_config
    from megatron_cpt.train.stage.loop import train

    os.chdir(root)
    return train(load_config(Path("tasks/ja"), "llama3-8b", "50B", variant))


def train_here(root: str, arguments: list[str]) -> int:
    """Run `megatron-cpt train ARGUMENTS` on this rank; return its exit code."""
    from megatron_cpt.verbs.dispatch import load_verb

    os.chdir(root)
    module, parser = load_verb("train", "megatron-cpt train")
    code: int = module.run(parser.parse_args(arguments))
    return code
