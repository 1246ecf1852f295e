"""Checks before anything is queued: site, data, checkpoint, disk. A typo must not wait two days."""

import dataclasses
from pathlib import Path

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.schema import LaunchConfig, RunConfig
from megatron_cpt.errors import CptError, DataError, LaunchError
from megatron_cpt.launch.planning.plan import plan_run
from megatron_cpt.launch.scheduler.job import format_walltime
from megatron_cpt.launch.scheduler.site import Site
from megatron_cpt.log import format_bytes
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.progress import last_checkpoint


def check_site(launch: LaunchConfig, site: Site) -> None:
    """Raise LaunchError naming everything that the site still needs from the user."""
    mistakes = []
    for name in site.requires:
        if not getattr(site, name, None):
            mistakes.append(
                f"site: no {name}. The site wants one. Give --{name}, MEGATRON_CPT_{name.upper()}, or site.{name} in your "
                "own copy of the site file."
            )
    if site.max_walltime is not None and launch.walltime > site.max_walltime:
        mistakes.append(
            f"launch.walltime: {format_walltime(launch.walltime)}, the site allows "
            f"{format_walltime(site.max_walltime)}. Shorten it and use --chain."
        )
    if launch.exit_before_walltime >= launch.walltime:
        mistakes.append(
            f"launch.exit_before_walltime: {launch.exit_before_walltime} s of a walltime of "
            f"{launch.walltime} s. The run would end at once. Make it smaller."
        )
    if mistakes:
        raise LaunchError("\n".join(mistakes))


def check_training(loaded: LoadedConfig, run: RunDir, *, data_will_exist: bool = False) -> None:
    """Raise LaunchError listing everything that a training job will need and has not (`training_problems`)."""
    mistakes = training_problems(loaded, run, data_will_exist=data_will_exist)
    if mistakes:
        raise LaunchError("\n".join(mistakes))


def training_problems(loaded: LoadedConfig, run: RunDir, *, data_will_exist: bool = False) -> list[str]:
    """Return what a training job will need and has not, a line each: data, the checkpoint it starts from, disk.

    `data_will_exist`: an earlier job of the same pipeline makes the token files.
    """
    mistakes = []
    config = loaded.config
    from megatron_cpt.data.blend.plan import check_tokenizer_rows  # only here: numpy and the tokenizer's library

    try:
        check_tokenizer_rows(config) if data_will_exist else check_data(config)
    except CptError as problem:
        mistakes.append(str(problem))
    if last_checkpoint(run) == 0:
        mistakes += _init_mistakes(config)
    plan = plan_run(config)
    needed = plan.num_checkpoints * plan.checkpoint_bytes
    on_disk = sum(path.stat().st_size for path in run.checkpoints.glob("iter_*/*") if path.is_file())
    quota = f" (quota of {plan.quota.owner})" if plan.quota and plan.room_bytes < plan.free_bytes else ""
    if needed - on_disk > plan.room_bytes:
        mistakes.append(
            f"{config.paths.runs_dir}: {format_bytes(plan.room_bytes)} free{quota}. {plan.num_checkpoints} checkpoints of "
            f"{format_bytes(plan.checkpoint_bytes)} need {format_bytes(needed)}. Set checkpoint.keep_last."
        )
    return mistakes


def check_data(config: RunConfig) -> None:
    """Plan the blend, as the first rank will.

    Raises: DataError when a corpus is missing, damaged or too small, or held-out shards are missing.
    """
    from megatron_cpt.data.blend.plan import plan_blend  # only here: it reads indices with numpy
    from megatron_cpt.data.blend.sources import validation_prefixes
    from megatron_cpt.data.blend.start_position import continued_order

    plan_blend(config, order=continued_order(config))
    problems: list[str] = []
    for corpus in config.data.corpora if config.evaluation.eval_interval else ():
        validation_prefixes(config, corpus, problems)
    if problems:
        raise DataError("\n".join(problems))


def _init_mistakes(config: RunConfig) -> list[str]:
    text = config.init.from_path
    if text is None:
        return []
    if text.startswith("variant:"):
        name, _, iteration = text.removeprefix("variant:").partition("@")
        parent = run_dir(dataclasses.replace(config, variant=name))
        if last_checkpoint(parent) == 0:
            return [
                f"init.from_path: {text}: {parent.checkpoints} has no checkpoint. Train {name} first, or wait for it."
            ]
        wanted = parent.checkpoints / f"iter_{int(iteration):07d}" if iteration.isdigit() else None
        if wanted is not None and not (wanted / "manifest.json").is_file():
            return [f"init.from_path: {text}: {wanted} is missing or incomplete. Choose an iteration that is on disk."]
        return []
    path = Path(text)
    marks = ("config.json", "manifest.json", "metadata.json", "latest_checkpointed_iteration.txt")
    foreign = ("mp_rank_*/model_optim_rng.pt", "zero/*/fp32.pt", ".metadata")
    if not any((path / mark).is_file() for mark in marks) and not any(any(path.glob(mark)) for mark in foreign):
        return [f"init.from_path: {text} is no Hugging Face folder and no checkpoint. Name one, or null for none."]
    return []
