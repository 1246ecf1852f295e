"""Tasks: the configuration of a run, a new task from a model and text, its requirements, and its training."""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.loading.resolve import LoadedConfig, load_from_arguments
from megatron_cpt.config.settings.fields import plain, setting_keys, setting_value
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import LaunchError
from megatron_cpt.interface.html import html_table
from megatron_cpt.interface.runs import Run
from megatron_cpt.launch.planning.plan import GIB, Plan, plan_run, plan_text
from megatron_cpt.launch.scheduler.site import read_site
from megatron_cpt.run.directory import run_dir
from megatron_cpt.start.init import Initialised, init_task
from megatron_cpt.start.length import with_length
from megatron_cpt.verbs.dispatch import parse_words


@dataclass(frozen=True)
class Settings:
    """A run's settings and where each comes from."""

    config: RunConfig
    origins: Mapping[str, str]

    def __getitem__(self, key: str) -> Any:
        """Return the value of a dotted key such as `optimizer.lr`."""
        return setting_value(self.config, key)

    @property
    def stated(self) -> dict[str, Any]:
        """Every setting that is not a default."""
        return {
            key: self[key] for key in setting_keys() if "." in key and self.origins.get(key, "default") != "default"
        }

    def _repr_html_(self) -> str:
        rows = [(key, plain(value), self.origins[key]) for key, value in self.stated.items()]
        return html_table(("setting", "value", "from"), rows, str(run_dir(self.config).path))


@dataclass(frozen=True)
class NewTask:
    """A task that `init` has written."""

    made: Initialised

    @property
    def task(self) -> Path:
        """Its folder."""
        return self.made.task

    @property
    def tokens(self) -> dict[str, int]:
        """Estimated tokens of each corpus."""
        return self.made.tokens

    def _repr_html_(self) -> str:
        made = self.made
        rows = [
            (name, f"{count:,}", f"{made.mix[name]:.1%}", f"{made.epochs[name]:.2g}")
            for name, count in self.tokens.items()
        ]
        return html_table(("corpus", "tokens (about)", "of the mix", "times read"), rows, str(made.task))


@dataclass(frozen=True)
class PlanView:
    """Requirements of a run: see `Plan`. Printing it shows the page of `megatron-cpt plan`."""

    plan: Plan
    estimate: str = ""
    """How a length in epochs was found whose token files are not made yet."""

    def __str__(self) -> str:
        return plan_text(self.plan, self.estimate)

    def _repr_html_(self) -> str:
        plan = self.plan
        rows = [
            (line[:12].strip(), line[12:].strip())
            for line in plan_text(plan, self.estimate).split("\n\n")[0].splitlines()
        ]
        rows.append(("memory", f"{plan.peak_bytes / GIB:.2f} GiB a rank at most"))
        return html_table(("", ""), rows)


def config(
    task: str | Path,
    *,
    params: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    site: str | None = None,
    settings: Sequence[str] = (),
) -> Settings:
    """Return the settings of a run, checked: of a task's folder, or of a run directory. `settings` are `key=value` that win."""
    loaded = _load(task, params, size, variant, site, settings)
    return Settings(loaded.config, loaded.origins)


def init(
    task: str | Path,
    *,
    model: str | Path,
    documents: Mapping[str, str | Sequence[str]] | None = None,
    replay: Mapping[str, str | Sequence[str]] | None = None,
    tokens: str | None = None,
    site: str | None = None,
    tokenizer: str | Path | None = None,
    replay_share: float = 0.1,
    held_out: str | None = None,
    seq_length: int | None = None,
    gpu_memory_gib: float | None = None,
) -> NewTask:
    """Write a task from a model, documents (corpus -> files, folders, globs) and a number of tokens; `model="tiny"` makes all."""
    made = init_task(
        Path(task),
        model=str(model),
        documents=_patterns(documents),
        replay=_patterns(replay),
        tokens=tokens,
        site=site,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        replay_share=replay_share,
        held_out=held_out,
        seq_length=seq_length,
        gpu_memory_gib=gpu_memory_gib,
    )
    return NewTask(made)


def plan(
    task: str | Path,
    *,
    params: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    site: str | None = None,
    settings: Sequence[str] = (),
    tokens_per_second: float | None = None,
    gpu_memory_gib: float | None = None,
) -> PlanView:
    """Return what a run needs before it is queued: tokens, iterations, memory per rank, disk, time."""
    loaded, estimate = with_length(_load(task, params, size, variant, site, settings))
    gib = gpu_memory_gib or read_site(site).gpu_memory_gib
    is_on_cpu = loaded.config.launch.scheduler == "local" and gib is None and not Path("/dev/nvidiactl").exists()
    memory = None if gib is None else int(gib * GIB)
    found = plan_run(
        loaded.config, tokens_per_second=tokens_per_second, gpu_memory_bytes=memory, is_fused=not is_on_cpu
    )
    return PlanView(found, estimate)


def train(
    task: str | Path,
    *,
    params: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    site: str | None = None,
    settings: Sequence[str] = (),
    stages: str = "train",
    account: str | None = None,
    queue: str | None = None,
) -> Run:
    """Train a stage, or with `stages="pipeline"` everything from documents to report; return its run.

    On this machine the call returns when it is done, with a scheduler when the jobs are queued. The same call continues.

    Raises: LaunchError when the stage ended with an error; its logs are in the run directory.
    """
    arguments = _named(task, params, size, variant, site, settings)
    words = ["--task", str(arguments.task)]
    for name in ("params", "size", "variant", "site"):
        words += [f"--{name}", str(getattr(arguments, name))] if getattr(arguments, name) else []
    for name, value in (("account", account), ("queue", queue)):
        words += [f"--{name}", value] if value else []
    submit = importlib.import_module("megatron_cpt.verbs.submit")
    parser = argparse.ArgumentParser(prog="train")
    submit.add_arguments(parser)
    code = submit.run(parse_words(parser, [stages, *words, *settings]))
    path = run_dir(_load(task, params, size, variant, site, settings).config).path
    if code:
        raise LaunchError(
            f"{path}: ended with exit code {code}. Its logs are in {path / 'logs'}. Call again to continue."
        )
    return Run(path)


def _load(
    task: str | Path,
    params: str | None,
    size: str | None,
    variant: str | None,
    site: str | None,
    settings: Sequence[str],
) -> LoadedConfig:
    return load_from_arguments(_named(task, params, size, variant, site, settings))


def _named(
    task: str | Path,
    params: str | None,
    size: str | None,
    variant: str | None,
    site: str | None,
    settings: Sequence[str],
) -> argparse.Namespace:
    named = {"params": params, "size": size, "variant": variant, "site": site}
    return argparse.Namespace(task=Path(task), overrides=list(settings), **named)


def _patterns(corpora: Mapping[str, str | Sequence[str]] | None) -> dict[str, list[str]]:
    return {name: [one] if isinstance(one, str) else list(one) for name, one in (corpora or {}).items()}
