"""Which nodes of a job are not fit to train, judged from measurements of all ranks, and the list of nodes to avoid.

A node is bad when it is far from the job's median (a matrix product at less than 80 percent, disk writes at less than a
tenth), when its memory, clock or versions do not fit, or when it lacks a GPU. The list `<run>/jobs/excluded_nodes.txt`
contains a node and a reason per line. Later links avoid these nodes; users can edit the list.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.log import format_bytes

BAD_NODES_EXIT_CODE = 5
SLOW_FRACTION = 0.8
"""Of the median matrix-product rate; GPUs of one kind differ by a few percent."""
SLOW_DISK_FRACTION = 0.1
CLOCK_SECONDS = 5.0
FREE_MEMORY_FRACTION = 0.9
"""Fraction of a GPU's memory that must be free when a job starts."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Measurements of one rank."""

    rank: int
    host: str
    device: str
    num_devices: int
    matmul_flops: float
    """Multiply-adds x 2 per second of a large matrix product."""
    disk_bytes_per_second: float | None
    """Of a file written and flushed in the run directory; None: writing failed."""
    free_memory_bytes: int
    total_memory_bytes: int
    clock: float
    """Unix time right after a barrier."""
    versions: str
    kind: str = "cpu"
    """cuda or cpu: the device that training would use."""


def bad_nodes(reports: Sequence[RankReport], *, gpus_per_node: int, device: str | None = None) -> dict[str, list[str]]:
    """Return host -> reasons, for the hosts that should not train; `device` is the kind that every rank must have found."""
    findings: dict[str, list[str]] = defaultdict(list)
    # a rank without its GPU must not pull the median down
    same = [report for report in reports if device in (None, report.kind)] or reports
    flops = statistics.median(report.matmul_flops for report in same)
    disks = [report.disk_bytes_per_second for report in reports if report.disk_bytes_per_second]
    disk = statistics.median(disks) if disks else 0.0
    clock = statistics.median(report.clock for report in reports)
    versions = Counter(report.versions for report in reports).most_common(1)[0][0]
    for report in reports:
        where = f"rank {report.rank}"
        if device is not None and report.kind != device:
            findings[report.host].append(f"{where}: would train on {report.kind}, launch.device is {device}")
        if report.device != "cpu" and report.matmul_flops < SLOW_FRACTION * flops:  # CPUs are shared and noisy
            findings[report.host].append(
                f"{where}: {report.matmul_flops / 1e12:.2f} TFLOP/s, the median is {flops / 1e12:.2f}"
            )
        if report.disk_bytes_per_second is None:
            findings[report.host].append(f"{where}: cannot write into the run directory")
        elif report.disk_bytes_per_second < SLOW_DISK_FRACTION * disk:
            rate = format_bytes(report.disk_bytes_per_second)
            findings[report.host].append(f"{where}: writes {rate}/s, the median is {format_bytes(disk)}/s")
        if abs(report.clock - clock) > CLOCK_SECONDS:
            findings[report.host].append(f"{where}: its clock is {report.clock - clock:+.0f} s off")
        if report.versions != versions:
            findings[report.host].append(f"{where}: {report.versions}, most have {versions}")
        if report.device != "cpu":
            if report.num_devices < gpus_per_node:
                findings[report.host].append(f"{where}: sees {report.num_devices} GPUs of {gpus_per_node}")
            if report.free_memory_bytes < FREE_MEMORY_FRACTION * report.total_memory_bytes:
                free, total = format_bytes(report.free_memory_bytes), format_bytes(report.total_memory_bytes)
                findings[report.host].append(
                    f"{where}: {free} of {total} GPU memory are free; another process is on it"
                )
    return dict(findings)


def report_text(reports: Sequence[RankReport], bandwidth: float | None, bad: dict[str, list[str]]) -> str:
    """Return the measurements as a table with a line per host, and the problems."""
    hosts: dict[str, list[RankReport]] = defaultdict(list)
    for report in reports:
        hosts[report.host].append(report)
    width = max(len(host) for host in hosts)
    lines = [f"{'host':<{width}}  ranks  slowest TFLOP/s  disk write/s  free memory"]
    for host, ranks in hosts.items():
        slowest = min(rank.matmul_flops for rank in ranks) / 1e12
        disk = min(rank.disk_bytes_per_second or 0 for rank in ranks)
        memory = min(rank.free_memory_bytes for rank in ranks)
        lines.append(
            f"{host:<{width}}  {len(ranks):>5}  {slowest:15.2f}  {format_bytes(disk):>12}  {format_bytes(memory):>11}"
        )
    if bandwidth is not None:
        lines.append(f"all-reduce over {len(reports)} ranks: {format_bytes(bandwidth)}/s of bus bandwidth")
    lines += [f"BAD {host}: {reason}" for host, reasons in bad.items() for reason in reasons]
    return "\n".join(lines) + "\n"


def excluded_path(jobs_dir: Path) -> Path:
    """Return the list of nodes to avoid."""
    return jobs_dir / "excluded_nodes.txt"


def read_excluded(jobs_dir: Path) -> list[str]:
    """Return the nodes to avoid, once each."""
    try:
        lines = excluded_path(jobs_dir).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip() and not line.startswith("#")))


def add_excluded(jobs_dir: Path, bad: dict[str, list[str]]) -> None:
    """Append bad nodes, with the day and the reason, for the jobs that come next."""
    jobs_dir.mkdir(parents=True, exist_ok=True)
    with excluded_path(jobs_dir).open("a", encoding="utf-8") as file:
        for host, reasons in bad.items():
            file.write(f"{host}  {time.strftime('%Y-%m-%d')}  {'; '.join(reasons)}\n")
