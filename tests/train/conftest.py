"""A small experiment on disk: a tokenizer, two tokenized corpora with validation sets, a task and a params file."""

import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_cpt.data.tokenize.driver import tokenize
from tests.train.tiny import run_steps, tiny_config

WORDS = {
    "D0": "the a model learns text from books and letters slowly with care in long plain sentences".split(),
    "D1": "def return import for in range print self None True False lambda yield class pass while".split(),
}


def documents(corpus: str, count: int, seed: int) -> list[str]:
    """Return documents of random words of a corpus."""
    chooser = random.Random(f"{corpus}{seed}")
    return [" ".join(chooser.choices(WORDS[corpus], k=chooser.randrange(20, 120))) for _ in range(count)]


@pytest.fixture(scope="session")
def experiment_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder with `tokenizer/` and `tokens/`."""
    root = tmp_path_factory.mktemp("experiment") / "data"
    (root / "tokenizer").mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents("D0", 50, 0) + documents("D1", 50, 0), trainer)
    tokenizer.save(str(root / "tokenizer" / "tokenizer.json"))
    (root / "tokenizer" / "tokenizer_config.json").write_bytes(
        orjson.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    for corpus in WORDS:
        for name, count, seed in ((corpus, 300, 1), (f"{corpus}.validation", 15, 2)):
            lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in documents(corpus, count, seed))
            (root / f"{name}.jsonl").write_bytes(lines)
            tokenize([root / f"{name}.jsonl"], root / "tokenizer", output_prefix=root / "tokens" / name)
    return root


@pytest.fixture(scope="session")
def trained(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Any]]:
    """Per kind of model: a checkpoint of one CPU rank after two steps in fp32, and (loss, norm) of its next three."""
    made: dict[str, tuple[str, Any]] = {}

    def get(kind: str) -> tuple[str, Any]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            (losses,) = ranks.run(run_steps, 1, tiny_config(kind), 0, 2, None, str(root))
            assert losses[1][0] < losses[0][0] + 1
            checkpoint = str(root / "iter_0000002")
            (steps,) = ranks.run(run_steps, 1, tiny_config(kind), 2, 5, checkpoint, None)
            made[kind] = checkpoint, steps
        return made[kind]

    return get


@pytest.fixture
def experiment(tmp_path: Path, experiment_data: Path) -> Path:
    """Return a task folder whose runs live beside it; `params/tiny.yaml` is its params file."""
    return write_experiment(tmp_path, experiment_data)


def write_experiment(folder: Path, data: Path) -> Path:
    """Write the task that the fixture `experiment` describes, on the data folder `data`; return its folder."""
    task = folder / "tasks" / "small"
    (task / "params").mkdir(parents=True)
    (task / "params" / "tiny.yaml").write_text(
        textwrap.dedent("""\
        model:
          num_layers: 2
          hidden_size: 32
          ffn_hidden_size: 64
          num_attention_heads: 4
          num_query_groups: 2
          vocab_size: 400
          max_position_embeddings: 64
        training: {seq_length: 32, micro_batch_size: 2, global_batch_size: 8, precision: fp32}
        optimizer: {lr: 5e-3}
        """)
    )
    (task / "task.yaml").write_text(
        textwrap.dedent(f"""\
        paths: {{runs_dir: {folder}/runs, data_dir: {data}}}
        data:
          tokenizer: tokenizer
          corpora:
            D0: {{tokens: [tokens/D0_text_document], validation: [tokens/D0.validation_text_document]}}
            D1: {{tokens: [tokens/D1_text_document], validation: [tokens/D1.validation_text_document]}}
        logging: {{log_interval: 1, tensorboard: false}}
        sizes:
          short: {{training: {{train_iters: 8}}}}
        variants:
          base:
            data: {{mix: {{D0: 1.0}}}}
            schedule: {{lr_decay_style: constant, lr_warmup: 2}}
            checkpoint: {{save_interval: 4}}
          replay:
            data: {{mix: {{D1: 0.75, D0: 0.25}}}}
            init: {{from_path: "variant:base", load: full}}
            schedule: {{lr_decay_style: WSD, lr_cooldown: 4}}
            checkpoint: {{save_interval: 3}}
            evaluation: {{eval_interval: 4, eval_iters: 3}}
        """)
    )
    return task
