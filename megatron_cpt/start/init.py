"""Write a task from a model, documents and a number of tokens: `TASK_DIR/task.yaml` and `TASK_DIR/params/MODEL.yaml`."""

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.config.settings.fields import parse_field
from megatron_cpt.config.settings.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_cpt.config.settings.values import parse_count
from megatron_cpt.data.tokenizer.interface import check_reading, load_tokenizer
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.files import whole_dir, write_text
from megatron_cpt.launch.scheduler.site import read_site
from megatron_cpt.log import format_count
from megatron_cpt.start import tiny
from megatron_cpt.start.held_out import held_out_of
from megatron_cpt.start.look import look_at
from megatron_cpt.start.params_file import params_text, read_model
from megatron_cpt.start.propose import Machine, layout_for, length_and_batch, machine_of
from megatron_cpt.start.task_file import TaskPlan, epochs_of, mix_of, task_text

logger = logging.getLogger(__name__)

TINY = "tiny"
TINY_TOKENS = "400K"


@dataclass(frozen=True, kw_only=True)
class Initialised:
    """Files written and facts found by `init`."""

    task: Path
    params: Path
    site: str | None
    config: RunConfig
    tokens: dict[str, int] = field(default_factory=dict)
    """Estimated tokens of each corpus."""
    mix: dict[str, float] = field(default_factory=dict)
    epochs: dict[str, float] = field(default_factory=dict)

    @property
    def next_command(self) -> str:
        """Return the command that makes everything of it."""
        site = f" --site {self.site}" if self.site else ""
        return f"megatron-cpt submit pipeline {self.task}{site}"

    def text(self) -> str:
        """Return what was written, what was found, and the next commands."""
        rows = [
            f"  {name:<16} {format_count(count):>7} tokens, {self.mix[name]:>6.1%} of the mix, read {self.epochs[name]:.2g} times"
            for name, count in self.tokens.items()
        ]
        site = f" --site {self.site}" if self.site else ""
        commands = (f"megatron-cpt plan {self.task}{site}", self.next_command, f"megatron-cpt report {self.task}")
        notes = ("what it needs", "all of it, from documents to evaluation", "the page that shows it")
        width = max(map(len, commands))
        steps = [f"  {command:<{width}}  # {note}" for command, note in zip(commands, notes)]
        return "\n".join([f"{self.task / 'task.yaml'}", f"{self.params}", *rows, "", "next:", *steps]) + "\n"


def init_task(
    task: Path,
    *,
    model: str,
    documents: Mapping[str, Sequence[str]] | None = None,
    replay: Mapping[str, Sequence[str]] | None = None,
    tokens: str | None = None,
    site: str | None = None,
    tokenizer: Path | None = None,
    replay_share: float = 0.1,
    held_out: str | None = None,
    seq_length: int | None = None,
    gpu_memory_gib: float | None = None,
) -> Initialised:
    """Write a task's folder, which must not exist; return what is in it.

    `model` is a Hugging Face folder, a name on the Hub (fetched into the data folder) or `tiny`; `documents` and `replay` are
    corpus -> files, folders and globs. Everything is checked as a run's settings are before the folder appears.

    Raises: ConfigError, DataError, CheckpointError.
    """
    if task.exists():
        raise ConfigError(f"{task}: exists already. `init` never overwrites. Choose another folder, or remove it.")
    if task.suffix in (".yaml", ".yml") or not re.fullmatch(r"[\w.-]+", task.name):
        raise ConfigError(
            f"{task}: a task is a folder, named with letters, digits, `.`, `_` and `-`. Choose another name."
        )
    if not 0 < replay_share < 1:
        raise ConfigError(f"--replay-share {replay_share:g}: a part of the mix between 0 and 1 is needed, such as 0.1.")
    try:
        parse_field(float, held_out or "1/1000", "held_out")
    except ValueError as problem:
        raise ConfigError(f"--held-out: {problem}.") from None
    data_dir = Path("data") / task.name
    new, old = dict(documents or {}), dict(replay or {})
    _check_names(new, old)
    is_tiny = model == TINY and not Path(model).is_dir()
    folder = Path(model)
    if is_tiny:
        folder = data_dir / "models" / TINY
        new, old = _make_tiny(data_dir, folder, new, old)
    elif not new:
        raise ConfigError("--documents: none. Text to train on is needed. Add --documents NAME=GLOB.")
    elif not folder.is_dir():
        folder = _fetched(model, data_dir)
    tokens = tokens or (TINY_TOKENS if is_tiny else None)
    if tokens is None:
        raise ConfigError("--tokens: not given. How long the stage is has to be known. Add --tokens 1B.")
    num_tokens = _count(tokens)
    found = read_model(folder)
    tokenizer = tokenizer or folder
    loaded = load_tokenizer(tokenizer)
    if loaded.vocab_size > found.vocab_size:
        raise ConfigError(
            f"{tokenizer}: {loaded.vocab_size} tokens, the model has rows for {found.vocab_size}. "
            "Give the model's own --tokenizer, or extend its vocabulary when it is converted."
        )
    if not is_tiny:
        check_reading(loaded)  # as tokenizing does: refused now rather than in the second stage
    length, batch, lr = length_and_batch(found, num_tokens, seq_length)
    looks = [look_at(name, patterns, loaded) for name, patterns in (new | old).items()]
    plan = TaskPlan(
        name=task.name,
        data_dir=data_dir,
        tokenizer=tokenizer,
        model=folder,
        tokens=tokens,
        num_tokens=num_tokens,
        iterations=num_tokens // (length * batch),
        new=[look for look in looks if look.name in new],
        replay=[look for look in looks if look.name in old],
        replay_share=replay_share,
        held_out={look.name: held_out_of(look, length, held_out or ("1/10" if is_tiny else None)) for look in looks},
    )
    machine = _machine(site, gpu_memory_gib)
    proposed, note = layout_for(_first_config(found, length, batch, lr, num_tokens), machine)
    name = _params_name(folder)
    loaded_config = _write(task, name, params_text(proposed, str(folder), note), task_text(plan), tokens, site)
    mix = mix_of(plan)
    return Initialised(
        task=task,
        params=task / "params" / f"{name}.yaml",
        site=site,
        config=loaded_config,
        tokens={look.name: look.tokens for look in looks},
        mix=mix,
        epochs=epochs_of(plan, mix),
    )


def _check_names(new: Mapping[str, object], old: Mapping[str, object]) -> None:
    twice = sorted(set(new) & set(old))
    if twice:
        raise ConfigError(f"--replay {twice[0]}: the name of new documents too. Give each corpus a name of its own.")
    for name in (*new, *old):
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or name == "buffer":
            raise ConfigError(f"{name!r} cannot name a corpus. Letters, digits, `_` and `-` are needed.")


def _count(tokens: str) -> int:
    try:
        return parse_count(tokens)
    except ValueError as problem:
        raise ConfigError(f"--tokens {tokens}: {problem}.") from None


def _make_tiny(
    data_dir: Path, folder: Path, new: dict[str, Sequence[str]], old: dict[str, Sequence[str]]
) -> tuple[dict[str, Sequence[str]], dict[str, Sequence[str]]]:
    """Make the tiny model, and text where none is named; return the corpora."""
    if not new:
        if old:
            raise ConfigError(
                "--replay without --documents. Name both, or neither: `init --model tiny` makes its own text."
            )
        texts = tiny.write_texts(data_dir / "documents")
        new, old = {"python": [str(texts["python"])]}, {"prose": [str(texts["prose"])]}
    if not folder.exists():
        tiny.write_model(folder, _lines([*new.values(), *old.values()]))
    return new, old


def _lines(groups: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the texts of documents, a megabyte of each corpus, to train a tokenizer on."""
    from megatron_cpt.data.reading.documents import list_sources
    from megatron_cpt.data.reading.record_files import Reading, read_records, text_of

    reading = Reading(skip_bad_lines=True)
    for patterns in groups:
        left = 1 << 20
        for source in list_sources(patterns):
            for record in read_records(source, reading):
                if left <= 0:
                    break
                text = text_of(reading.value(record))
                left -= len(text)
                yield text


def _fetched(model: str, data_dir: Path) -> Path:
    """Return the folder of a model named on the Hugging Face Hub, fetched into the data folder."""
    from megatron_cpt.checkpoint.huggingface.hub import download  # heavy: the Hub's client

    if model.count("/") != 1 or model.startswith((".", "/", "~")) or Path(model).parent.is_dir():
        raise CheckpointError(f"--model {model}: no such folder, and no name on the Hub (OWNER/NAME). Check the path.")
    folder = data_dir / "models" / model.replace("/", "--")
    logger.info("%s: no folder here, fetched from the Hub into %s", model, folder)
    download(model, folder, exclude=("original/*", "*.pth", "*.gguf"))
    return folder


def _machine(site: str | None, gpu_memory_gib: float | None) -> Machine:
    if site is None:
        return machine_of(gpu_memory_gib, None)
    from megatron_cpt.config.loading.sources import find_site, read_yaml

    stated = (read_yaml(find_site(site)).get("launch") or {}).get("gpus_per_node", 1)
    return machine_of(gpu_memory_gib or read_site(site).gpu_memory_gib, int(stated))


def _first_config(model: ModelConfig, length: int, batch: int, lr: float, tokens: int) -> RunConfig:
    """Return a run of the model before it has a layout."""
    return RunConfig(
        task="init",
        params="init",
        size="init",
        model=model,
        parallel=ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
        training=TrainingConfig(
            seq_length=length, micro_batch_size=1, global_batch_size=batch, precision="bf16", train_tokens=tokens
        ),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 10),
        data=DataConfig(),
    )


def _params_name(folder: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.").lower() or "model"


def _write(task: Path, name: str, params: str, text: str, size: str, site: str | None) -> RunConfig:
    """Write the folder whole, once a run's settings can be made of it; return them."""
    with tempfile.TemporaryDirectory(prefix="megatron-cpt-init-") as scratch:
        trial = Path(scratch) / task.name
        write_text(trial / "params" / f"{name}.yaml", params)
        write_text(trial / "task.yaml", text)
        config = load_config(trial, name, size, site=site).config
        with whole_dir(task) as temporary:
            shutil.copytree(trial, temporary, dirs_exist_ok=True)
    return config
