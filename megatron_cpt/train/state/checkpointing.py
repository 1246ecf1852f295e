"""Saving and loading a training run through megatron-core's `dist_checkpointing`, reshardable to any layout.

Keys are per layer and named as Transformer Engine names them; optimizer state is `fully_reshardable`.
`checkpoint/torch_dist/mcore.py` completes a checkpoint (manifest, then tracker).
"""

import ctypes
import functools
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_cpt.checkpoint.torch_dist.content import content_hash, has_content
from megatron_cpt.checkpoint.torch_dist.mcore import (
    MANIFEST,
    check_free_space,
    checkpoint_dir,
    read_manifest,
    write_manifest,
    write_tracker,
)
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import (
    CHECKPOINT_VERSION,
    CONTENT,
    check_safe,
    find_step,
    megatron_args,
    read_common,
    write_common,
)
from megatron_cpt.checkpoint.torch_dist.pickles import first_line
from megatron_cpt.checkpoint.torch_dist.weights import is_extra_state
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError, storage_error
from megatron_cpt.files import read_json_object, write_json
from megatron_cpt.run.lock import fence
from megatron_cpt.train.backend.parallel import on_every_rank, on_rank_0
from megatron_cpt.train.model.build import unwrap
from megatron_cpt.train.state.approved import load_approved
from megatron_cpt.train.state.optimizer_state import loadable_state, main_prefix, rename_main_parameters

logger = logging.getLogger(__name__)
_TO_LOAD = "optimizer_to_load"

READ_BACK_ATTEMPTS, READ_BACK_WAIT_SECONDS = 3, 1.0
"""Another node's view of a network file system can lag behind the writes of this one."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when its parent dies."""


def save_checkpoint(
    root: Path,
    iteration: int,
    model: list[Any],
    optimizer: MegatronOptimizer,
    manifest: dict[str, Any],
    *,
    queue: AsyncCallsQueue | None = None,
    read_back: bool = True,
    after: Callable[[Path], None] | None = None,
) -> Path:
    """Write `<root>/iter_%07d` from all ranks, then its manifest, then the tracker; return the folder.

    Every rank hashes the files it wrote; with `read_back` the next rank, often on another node, reads them again and compares
    before the tracker names the checkpoint. With `queue` the files are written by forked processes while training continues:
    the call returns at once, and the checkpoint is complete when the queue has finalized it. `after` runs on rank 0
    then. An earlier save still in the queue is waited for.

    Raises: CheckpointError when the disk has too little room, or a file reads back otherwise than it was written.
    """
    if queue is not None:
        queue.maybe_finalize_async_calls(blocking=True)
    directory = checkpoint_dir(root, iteration)
    rank = torch.distributed.get_rank()
    needed_bytes = _expected_bytes(model)
    on_rank_0(lambda: _prepare_folder(directory, needed_bytes))
    state = _sharded_model(model)
    state["optimizer"] = optimizer.sharded_state_dict(_flat(state), metadata=_metadata())
    state |= _common_state(iteration, manifest)
    _start_results_queue()
    # The process group is for megatron-core's sharding (MTP in 0.19 needs it). It cannot be stored.
    content = {name: value for name, value in _metadata().items() if name != "dp_cp_group"}
    try:
        request = dist_checkpointing.save(
            state,
            os.fspath(directory),
            _save_strategy(),
            content_metadata=content,
            async_sharded_save=queue is not None,
            # The default of megatron-core 0.19 needs nvidia-resiliency-ext.
            async_strategy="mcore",
        )
    except CheckpointException as problem:
        cause = next(iter(problem.failures.values()))[0]
        said = str(storage_error(cause)) if isinstance(cause, OSError) else first_line(cause)
        raise CheckpointError(
            f"{directory}: could not be written ({said}). Look at the disk; the checkpoint before it is whole, and the "
            "same command continues from there."
        ) from problem

    def finish(hashes: dict[str, str]) -> None:
        write_common(directory, read_common(directory))  # Megatron-Core up to 0.16 looks for it in a file of its own
        with fence():  # a job that was stopped for long may have lost the run to another
            write_manifest(directory, manifest, hashes=hashes)
            write_tracker(root, iteration)
        if after is not None:
            after(directory)

    def complete() -> None:
        hashes = _gathered_hashes(directory, rank)
        if read_back:
            _read_back(directory, hashes)
        on_rank_0(lambda: finish(hashes))

    if queue is None:
        _hash_files(directory, rank)
        complete()
    else:
        writer = functools.partial(_write_and_hash, request.async_fn, directory, rank)
        request = request._replace(async_fn=writer)
        request.add_finalize_fn(complete)
        queue.schedule_async_request(request)
    return directory


def _common_state(iteration: int, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what Megatron-LM's loader looks for besides tensors (see `checkpoint/torch_dist/megatron_arguments.py`).

    Its scheduler's position is the samples consumed; rates are the run's own, so `--override-opt-param-scheduler` is needed
    where Megatron-LM trains on.
    """
    samples = manifest.get("consumed_samples") or 0
    config = manifest.get("config") or {}
    schedule = {
        "max_lr": (config.get("optimizer") or {}).get("lr"),
        "lr_warmup_steps": 0,
        "num_steps": samples,
        "lr_decay_style": (config.get("schedule") or {}).get("lr_decay_style"),
        "lr_decay_steps": samples,
        "min_lr": (config.get("optimizer") or {}).get("min_lr"),
        "start_wd": (config.get("optimizer") or {}).get("weight_decay"),
        "end_wd": (config.get("optimizer") or {}).get("weight_decay"),
        "wd_incr_style": "constant",
        "wd_incr_steps": samples,
    }
    arguments = megatron_args(
        ModelConfig(**manifest["model"]),
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        consumed_train_samples=samples,
        iteration=iteration,
    )
    return {
        "args": arguments,
        "iteration": iteration,
        "checkpoint_version": CHECKPOINT_VERSION,
        "num_floating_point_operations_so_far": 0,
        "opt_param_scheduler": schedule,
    }


def _start_results_queue() -> None:
    """Start the process that hands the writers' results to megatron-core, before megatron-core starts one itself.

    Its own imports this program again (3 to 6 s); a forked one takes 0.3 s. This one ends when a rank is killed.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(initializer=_die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _save_strategy() -> Any:
    strategy = TorchDistSaveShardedStrategy()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(strategy, group) if group.size() > 1 else strategy


def _write_and_hash(
    write: Callable[..., None] | None, directory: Path, rank: int, *arguments: Any, **options: Any
) -> None:
    """Write a rank's files in the writer process, then hash them there."""
    if write is not None:
        write(*arguments, **options)
    _hash_files(directory, rank)


def _hash_files(directory: Path, rank: int) -> None:
    hashes = {path.name: content_hash(path) for path in directory.glob(f"__{rank}_*.distcp")}
    write_json(_hashes_path(directory, rank), hashes)


def _gathered_hashes(directory: Path, rank: int) -> dict[str, str]:
    path = _hashes_path(directory, rank)
    hashes = on_every_rank(lambda: read_json_object(path, CheckpointError))
    path.unlink(missing_ok=True)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, hashes)
    return {name: value for part in gathered for name, value in part.items()}


def _read_back(directory: Path, hashes: dict[str, str]) -> None:
    """Read the files of the rank before this one and compare their hashes. Raises: CheckpointError on every rank."""
    neighbour = (torch.distributed.get_rank() - 1) % torch.distributed.get_world_size()
    own = {name: digest for name, digest in hashes.items() if name.startswith(f"__{neighbour}_")}
    wrong = [name for name, digest in own.items() if not _has_hash(directory / name, digest)]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, wrong)
    damaged = [name for part in gathered for name in part]
    if damaged:
        raise CheckpointError(
            f"{directory}: {', '.join(damaged)} reads back with another hash than it was written with. The save does not "
            "count and nothing older is deleted. Look at the file system."
        )


def _has_hash(path: Path, digest: str) -> bool:
    for _ in range(READ_BACK_ATTEMPTS):
        if path.is_file() and has_content(path, digest):
            return True
        time.sleep(READ_BACK_WAIT_SECONDS)
    return False


def _hashes_path(directory: Path, rank: int) -> Path:
    return directory / f".hashes_{rank}.json"


def load_checkpoint(directory: Path, model: list[Any], optimizer: MegatronOptimizer | None) -> None:
    """Load a verified checkpoint's parameters, and its optimizer state when an optimizer is given.

    Without one, the caller's optimizer must copy the parameters afterwards (`reload_model_params`).

    Raises: CheckpointError when the checkpoint lacks optimizer state that is asked for, or does not fit the model.
    """
    if optimizer is not None and on_rank_0(lambda: read_manifest(directory))["content"] != "full":
        raise CheckpointError(
            f"{directory}: holds weights only. init.load=full needs optimizer state. Use init.load=weights."
        )
    on_rank_0(lambda: check_safe(directory))
    state = _sharded_model(model)
    if optimizer is not None:
        # not under "optimizer": megatron would merge it with the saving layout's groups, of which only the step counts
        state[_TO_LOAD] = optimizer.sharded_state_dict(_flat(state), is_loading=True, metadata=_metadata())
        rename_main_parameters(state[_TO_LOAD], on_rank_0(lambda: main_prefix(directory)))
    loaded = load_approved(state, directory)
    for index, chunk in enumerate(model):
        # Not strict: Transformer Engine's extra states are not saved (`_sharded_model`). dist_checkpointing has
        # already refused missing tensors.
        unwrap(chunk).load_state_dict(loaded["model" if len(model) == 1 else f"model{index}"], strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(loadable_state(loaded[_TO_LOAD], optimizer, find_step(loaded.get("optimizer"))))


def _metadata() -> dict[str, Any]:
    return {**CONTENT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _sharded_model(model: list[Any]) -> ShardedStateDict:
    state: ShardedStateDict = {}
    for index, chunk in enumerate(model):
        part = unwrap(chunk).sharded_state_dict(metadata=_metadata())
        # Transformer Engine's fp8 state: absent from converted checkpoints, empty in bf16
        state["model" if len(model) == 1 else f"model{index}"] = {
            name: value for name, value in part.items() if not is_extra_state(name)
        }
    return state


def _flat(state: ShardedStateDict) -> ShardedStateDict:
    return state.get("model", state)


def _expected_bytes(model: list[Any]) -> int:
    """Return the bytes of a checkpoint: per parameter its weight and three fp32 optimizer values."""
    weights = sum(p.numel() * (p.element_size() + 12) for chunk in model for p in chunk.parameters())
    model_ranks = torch.distributed.get_world_size() // parallel_state.get_data_parallel_world_size()
    return weights * model_ranks


def _prepare_folder(directory: Path, needed_bytes: int) -> None:
    """Make an empty folder for a save. An unfinished save in its place is cleared, a finished one moved aside."""
    with fence():  # checked, not held: to remove a large folder takes longer than the lock lives
        pass
    check_free_space(directory.parent, needed_bytes)
    if directory.exists():
        if (directory / MANIFEST).exists():
            aside = directory.with_name(f"replaced_{directory.name}_{time.strftime('%Y%m%dT%H%M%S')}")
            directory.rename(aside)
            logger.warning("%s: existed and is written anew; the old one is kept as %s", directory, aside.name)
        else:
            shutil.rmtree(directory)
    directory.mkdir(parents=True)
