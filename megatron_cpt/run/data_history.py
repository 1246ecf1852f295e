"""Settings and data list that a run used up to an iteration, kept for the trace after its data was changed.

`<run>/superseded/iter_0000004/` holds `config.yaml`, `train_data.yaml` and, where there is one, `data_order.json` of the
iterations up to 4 (after those of the folder before it). The run's own files are for the iterations after the last folder.
"""

import logging
import shutil
from pathlib import Path

from megatron_cpt.files import whole_dir
from megatron_cpt.run.directory import RunDir

logger = logging.getLogger(__name__)


def keep_superseded(run: RunDir, iteration: int, *, is_changed: bool) -> None:
    """Keep the run's files for its first `iteration` iterations where they are about to change.

    A run that rolled back to before the change uses the current data for all following iterations.
    """
    later = [number for number in _iterations(run) if number > iteration]
    for number in later[1:] if iteration else later:
        shutil.rmtree(_folder(run, number))
    if iteration and later and not _folder(run, iteration).exists():
        _folder(run, later[0]).rename(_folder(run, iteration))
    elif later and iteration:
        shutil.rmtree(_folder(run, later[0]))
    if not is_changed or not iteration or _folder(run, iteration).exists():
        return
    with whole_dir(_folder(run, iteration)) as folder:
        for path in (run.config_path, run.data_list_path, run.data_order_path):
            if path.exists():
                shutil.copy2(path, folder / path.name)
    logger.info("%s: what the run read so far is kept in %s", run.path, _folder(run, iteration))


def reading_of(run: RunDir, iteration: int) -> RunDir:
    """Return the folder with the data files of an iteration: the run's own, or a superseded one."""
    number = next((number for number in _iterations(run) if number >= iteration), None)
    return run if number is None else RunDir(_folder(run, number))


def _iterations(run: RunDir) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in run.superseded.glob("iter_*[0-9]"))


def _folder(run: RunDir, iteration: int) -> Path:
    return run.superseded / f"iter_{iteration:07d}"
