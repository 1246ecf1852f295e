"""megatron-core's loading of `torch_dist` folders from checked data, instead of reading the files a second time.

torch unpickles the index with plain `pickle.load` and objects with `weights_only=False`; megatron-core asks for both. Here the
index is the one that `checkpoint/torch_dist/dcp.py` built from checked values, and objects are those that `checkpoint/torch_dist/pickles.py` let through,
so that a file which changes in between, or which two readers understand differently, gains nothing.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.planner import LoadItemType

from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import read_common
from megatron_cpt.checkpoint.torch_dist.pickles import first_line
from megatron_cpt.errors import CheckpointError, CptError, DamagedError, storage_error
from megatron_cpt.train.backend.parallel import on_every_rank


def load_approved(state: ShardedStateDict, directory: Path) -> dict[str, Any]:
    """Return `state` filled from the checkpoint `directory`, with its common state, as `dist_checkpointing.load` does.

    Collective: a read error of one rank is raised on all.

    Raises: CheckpointError when a pickle in it could run code, or it does not fit the model; DamagedError when it cannot be read.
    """
    reader, common = on_every_rank(lambda: _opened(directory))
    return on_every_rank(lambda: _loaded(state, directory, reader, common))


def _opened(directory: Path) -> tuple["_ApprovedReader", dict[str, Any]]:
    """Return what is needed before ranks first speak to each other, so that none waits for one that failed."""
    try:
        reader = _ApprovedReader(directory)
        serialization.verify_checkpoint(os.fspath(directory))
        return reader, read_common(directory, reader.slices)
    except OSError as problem:
        raise DamagedError(f"{directory}: cannot be read: {storage_error(problem)}") from None


def _loaded(
    state: ShardedStateDict, directory: Path, reader: "_ApprovedReader", common: dict[str, Any]
) -> dict[str, Any]:
    with (  # names that a later megatron-core no longer has fail here, loudly
        mock.patch.object(torch_strategy, "_get_filesystem_reader", lambda *_, **__: reader),
        mock.patch.object(serialization, "load_common_state_dict", lambda _: common),
    ):
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(state, os.fspath(directory))
        except (KeyError, ValueError, CheckpointingException) as problem:
            raise CheckpointError(
                f"{directory}: does not fit the model ({str(problem)[:500]}). The params file must be the one it was made with."
            ) from problem
        except CheckpointException as failed:  # no Exception: nothing else would catch it
            cause = next(iter(failed.failures.values()))[0]
            if isinstance(cause, CptError):
                raise cause from None
            said = str(storage_error(cause)) if isinstance(cause, OSError) else first_line(cause)
            raise DamagedError(
                f"{directory}: cannot be loaded ({said}). It is damaged or does not fit the model."
            ) from failed
    return loaded


class _ApprovedReader(FileSystemReader):
    """torch's reader with our index and our way to read objects."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.slices = DcpReader(directory)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.slices.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        objects = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        for item in objects:  # the planner would unpickle them without an allow-list
            planner.state_dict[item.dest_index.fqn] = self.slices.read_object(item.storage_index.fqn)
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        return super().read_data(dataclasses.replace(plan, items=tensors), planner)
