"""Start position of a stage with `data.order: continue`: after the samples that its parent run had read."""

import dataclasses
from typing import TYPE_CHECKING

from megatron_cpt.config.loading.resolve import read_resolved
from megatron_cpt.config.settings.batch_sizes import batch_sizes
from megatron_cpt.config.settings.derived import train_iters, train_samples
from megatron_cpt.config.settings.fields import setting_value
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.lists.data_list import read_data_list
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.progress import last_checkpoint

if TYPE_CHECKING:
    from megatron_cpt.data.blend.stage_order import StageOrder

SAME_DATA = (
    "training.seq_length", "data.tokenizer", "data.mix", "data.rules", "data.base_pool", "data.base_ratio", "data.cap_epochs",
    "data.train_data_path", "data.buffer", "data.shuffle_in_corpus", "data.skip_list",
)  # fmt: skip
"""Settings that say what a stage reads; besides, the token files of its corpora."""


def continued_order(config: RunConfig) -> "StageOrder | None":
    """Return the order that a stage continues, None for one of its own.

    A stage that has begun goes by its run directory; another by the run of `init.from_path`.

    Raises: DataError when that run is missing, or reads other data.
    """
    from megatron_cpt.data.blend.stage_order import read_order  # numpy: only where an order is asked for

    run = run_dir(config)
    if last_checkpoint(run) and run.data_order_path.exists():
        return read_order(run.data_order_path, config.training)
    if config.data.order == "own":
        return None
    text = config.init.from_path or ""
    name, _, iteration = text.removeprefix("variant:").partition("@")
    parent = run_dir(dataclasses.replace(config, variant=name))
    if not parent.config_path.exists() or not parent.data_list_path.exists():
        raise DataError(
            f"data.order is continue and {parent.path} has not begun: there is no order to continue. Train {name} first."
        )
    source = read_resolved(parent.config_path)
    different = data_differences(source, config)
    if different:
        raise DataError(
            f"data.order is continue and {parent.path} reads other data: {'; '.join(different)}. Make them equal, or set "
            "data.order=own."
        )
    order = order_after(parent, source, int(iteration) if iteration.isdigit() else last_checkpoint(parent))
    return dataclasses.replace(order, count=train_samples(config.training))


def order_after(run: RunDir, config: RunConfig, iteration: int) -> "StageOrder":
    """Return the order of a run from after an iteration on, for a stage of the run's own length."""
    from megatron_cpt.data.blend.stage_order import StageOrder, read_order  # numpy: only where an order is asked for

    manifest = run.checkpoints / f"iter_{iteration:07d}" / "manifest.json"
    if manifest.exists():
        consumed = int(read_json_object(manifest, DataError).get("consumed_samples") or 0)
    else:
        consumed = batch_sizes(config.training).samples(min(iteration, train_iters(config.training)))
    source = f"{run.path} after iteration {iteration}"
    if run.data_order_path.exists():
        begun = read_order(run.data_order_path, config.training)
        return dataclasses.replace(begun, source=source, position=begun.position + consumed)
    return StageOrder(
        source=source,
        position=consumed,
        num_samples=train_samples(config.training),
        count=train_samples(config.training),
        seq_length=config.training.seq_length,
        seed=config.training.seed,
        shuffle_in_corpus=config.data.shuffle_in_corpus,
        entries=tuple(read_data_list(run.data_list_path)),
    )


def data_differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Return in words which settings let two stages read different data; the seed and the length do not count."""
    found = [
        f"{key} is {setting_value(other, key)}, not {setting_value(one, key)}"
        for key in SAME_DATA
        if setting_value(one, key) != setting_value(other, key)
    ]
    read = [name for name in other.data.corpora if not other.data.mix or name in other.data.mix]
    for name in read:
        tokens = [c.data.corpora[name].tokens if name in c.data.corpora else () for c in (one, other)]
        if tokens[0] != tokens[1]:
            found.append(f"data.corpora.{name}.tokens is {list(tokens[1])}, not {list(tokens[0])}")
    return found
