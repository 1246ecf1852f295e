"""Process groups and random seeds of a training process."""

import datetime
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)

from megatron_cpt.config.settings.derived import megatron_virtual_size, model_parallel_size
from megatron_cpt.config.settings.schema import LaunchConfig, RunConfig
from megatron_cpt.errors import ConfigError, CptError, storage_error
from megatron_cpt.launch.node.hosts import wait_for_name
from megatron_cpt.train.backend import cpu


def initialize_parallel(config: RunConfig, timeout_seconds: int = 1800, met: Callable[[], None] = lambda: None) -> None:
    """Join the job that torchrun's environment describes; build megatron's process groups and seed this rank.

    Without torchrun's variables the process is a job of one rank. NCCL on GPUs, gloo on CPU. `met` is called when all ranks
    can speak to each other, before groups are made as the settings say.

    Raises: ConfigError when the number of ranks does not fit the layout.
    """
    check_device(config.launch)
    cpu.substitute()
    parallel, training = config.parallel, config.training
    if not torch.distributed.is_initialized():
        _initialize_distributed(timeout_seconds)
    met()
    world_size = torch.distributed.get_world_size()
    model_size = model_parallel_size(parallel)
    if world_size % model_size:
        raise ConfigError(
            f"parallel: {world_size} ranks were started, not a multiple of TP x PP x CP = {model_size}. "
            f"Start {model_size} ranks or a multiple of it."
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=megatron_virtual_size(parallel),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=not cpu.is_cpu(),  # on CPU the groups are gloo already
        distributed_timeout_minutes=max(timeout_seconds // 60, 1),
    )
    # Pipeline stages draw different numbers, as in Megatron-LM's training/initialize.py.
    seed = training.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    init_num_microbatches_calculator(
        torch.distributed.get_rank(),
        None,
        training.global_batch_size,
        training.micro_batch_size,
        parallel_state.get_data_parallel_world_size(),
    )


def check_device(launch: LaunchConfig) -> None:
    """Raise ConfigError where this rank would train on another device than `launch.device` names."""
    wanted, found = launch.device, "cpu" if cpu.is_cpu() else "cuda"
    if wanted in (None, found):
        return
    host = socket.gethostname()
    if wanted == "xpu":
        raise ConfigError(
            f"launch.device is xpu, and training does not drive Intel GPUs; on {host} it would run on {found}. Use a site with "
            "CUDA devices, or set launch.device=cpu to train on CPU on purpose."
        )
    has = f"built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    raise ConfigError(
        f"launch.device is {wanted}, and torch {torch.__version__} ({has}) finds {found} on {host}. Look at the driver "
        f"(nvidia-smi) and at the installed wheel (megatron-cpt doctor), or set launch.device={found} where it is meant."
    )


def finish_parallel() -> None:
    """Leave the process groups."""
    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Return on every rank what `function` returns on rank 0, or raise on every rank the CptError it raises there.

    Errors of the operating system become a CptError. So a mistake that only rank 0 can see ends all ranks with the same
    exit code, instead of one with the mistake's and the others with a lost connection.
    """
    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = function()
        except CptError as error:
            answer[1] = error
        except OSError as problem:
            answer[1] = storage_error(problem)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def on_every_rank(function: Callable[[], Any]) -> Any:
    """Return what `function` returns on this rank; when it fails on any, raise on every rank the CptError of the first.

    The error contains the rank and its host, because a disk or a mount can fail on one node only. Collective.
    """
    result, problem = None, None
    try:
        result = function()
    except CptError as error:
        problem = error
    except OSError as error:
        problem = storage_error(error)
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        if problem is not None:
            raise problem
        return result
    answers: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(answers, (socket.gethostname(), problem))
    failed = [(rank, host, found) for rank, (host, found) in enumerate(answers) if found is not None]
    for rank, host, found in failed:
        raise type(found)(f"rank {rank} on {host}: {found} {len(failed)} of {ranks} ranks say so.")
    return result


def _initialize_distributed(timeout_seconds: int) -> None:
    cpu.set_threads()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] != "1":
        wait_for_name(os.environ["MASTER_ADDR"])
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if cpu.is_cpu():
        store = None
        if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
            store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            "gloo",
            timeout=timeout,
            **({"store": store, "rank": 0, "world_size": 1} if store is not None else {}),
        )
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    os.environ.setdefault("MASTER_PORT", "29500")
    torch.distributed.init_process_group("nccl", timeout=timeout, device_id=device)
