"""Measurements of one rank before training: a matrix product, an all-reduce, a disk write, memory, clock, versions."""

import os
import platform
import socket
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from megatron_cpt.launch.node.preflight import RankReport

TIMEOUT = timedelta(seconds=120)
"""A fabric that does not answer within this is broken."""
DISK_BYTES = 16 << 20


def run_preflight(directory: Path) -> tuple[list[RankReport], float | None]:
    """Measure on every rank of the job; return all ranks' reports in order, and the all-reduce's bus bandwidth.

    `directory`: target of the disk write. Joins and leaves a process group of its own.
    """
    on_gpu = torch.cuda.is_available()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29400")):
        os.environ.setdefault(name, value)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # a node that lacks its GPU joins too, so that it can be named: NCCL is used only once every rank is known to have one
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        report = _measure(directory, device)
        reports: list[RankReport] = [report] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, report)
        if len({one.kind for one in reports}) > 1:
            return reports, None
        group = torch.distributed.new_group(backend="nccl", timeout=TIMEOUT) if on_gpu else None
        return reports, _all_reduce_bandwidth(device, group)
    finally:
        torch.distributed.destroy_process_group()


def _measure(directory: Path, device: torch.device) -> RankReport:
    flops = _matmul_flops(device)
    disk = _disk_rate(directory)
    on_gpu = device.type == "cuda"
    memory = psutil.virtual_memory()
    free, total = torch.cuda.mem_get_info(device) if on_gpu else (memory.available, memory.total)
    torch.distributed.barrier()
    return RankReport(
        rank=torch.distributed.get_rank(),
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),  # as the scheduler calls it
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        num_devices=torch.cuda.device_count(),
        matmul_flops=flops,
        disk_bytes_per_second=disk,
        free_memory_bytes=free,
        total_memory_bytes=total,
        clock=time.time(),
        kind=device.type,
        versions=f"Python {platform.python_version()}, torch {torch.__version__}",
    )


def _matmul_flops(device: torch.device) -> float:
    """Return the best rate of several products: noise only ever slows one down."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _disk_rate(directory: Path) -> float | None:
    path = directory / f".preflight.{socket.gethostname()}.{os.getpid()}"
    block = os.urandom(1 << 20)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return DISK_BYTES / (time.perf_counter() - started)
    except OSError:
        return None
    finally:
        path.unlink(missing_ok=True)


def _all_reduce_bandwidth(device: torch.device, group: torch.distributed.ProcessGroup | None) -> float | None:
    """Return bytes x 2 (n - 1) / n per second, the bus bandwidth as nccl-tests define it; None on one rank."""
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return None
    tensor = torch.ones((256 << 20 if device.type == "cuda" else 8 << 20) // 4, device=device)
    best = float("inf")
    for _ in range(5):
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        tensor.fill_(1.0)
    return tensor.nbytes * 2 * (ranks - 1) / ranks / best
