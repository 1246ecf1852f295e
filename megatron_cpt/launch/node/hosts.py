"""The hosts of a job, and which of them train: bad ones give their place to spare ones.

PBS has no list of hosts to avoid, so a job there asks for some more than it needs (`launch.spare_nodes`) and trains on
those that `excluded_nodes.txt` does not name. Slurm leaves hosts out by itself (`--exclude`).
"""

import functools
import logging
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_cpt.errors import LaunchError

logger = logging.getLogger(__name__)

RESOLVE_SECONDS = 60.0
"""Time-out for the rendezvous host to get an address."""


def job_hosts(environment: Mapping[str, str]) -> list[str]:
    """Return the job's hosts once each, in the scheduler's order; PBS lists a host once per process."""
    if environment.get("PBS_NODEFILE"):
        lines = Path(environment["PBS_NODEFILE"]).read_text(encoding="utf-8").split()
        return list(dict.fromkeys(lines))
    if environment.get("SLURM_JOB_NODELIST"):
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=False,
        )
        if listed.returncode == 0 and listed.stdout.split():
            return listed.stdout.split()
        raise LaunchError(f"scontrol show hostnames {environment['SLURM_JOB_NODELIST']}: {listed.stderr.strip()}.")
    return [socket.gethostname()]


def training_hosts(hosts: Sequence[str], excluded: Sequence[str], nodes: int) -> list[str]:
    """Return the `nodes` hosts that train, those that are not excluded first, in the scheduler's order.

    Excluded hosts train all the same, with a warning, where there are too few others.

    Raises: LaunchError when the job has fewer hosts than nodes.
    """
    if len(hosts) < nodes:
        raise LaunchError(f"{', '.join(hosts)}: {len(hosts)} hosts, {nodes} are needed. Check the select.")
    bad = excluded_hosts(hosts, excluded)
    good = [host for host in hosts if host not in bad]
    chosen = set([*good, *bad][:nodes])
    if len(good) < nodes:
        logger.warning(
            "%s: bad nodes train, since the job has no others. Raise launch.spare_nodes.",
            ", ".join(host for host in hosts if host in chosen and host in bad),
        )
    return [host for host in hosts if host in chosen]


def wait_for_name(host: str, seconds: float = RESOLVE_SECONDS) -> None:
    """Return as soon as `host` has an address: a node that has just booted can be unknown for a moment.

    Raises: LaunchError naming it and this host when it has none after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as problem:
            if time.monotonic() >= deadline:
                raise LaunchError(
                    f"MASTER_ADDR: {host!r} has no address on {socket.gethostname()}, tried for {seconds:.0f} s "
                    f"({problem.strerror}). The ranks meet there. Look at the node's name service, or name the host otherwise."
                ) from None
            time.sleep(min(2.0, max(deadline - time.monotonic(), 0.05)))


def excluded_hosts(hosts: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Return the hosts that a list of excluded ones means.

    A node calls itself by `gethostname()`, the scheduler's list can have its full name or an alias. Two names match if
    they are equal, if one is the other without its domain, or if both have the same address.
    """
    return [host for host in hosts if any(is_same_host(host, other) for other in excluded)]


def is_same_host(one: str, other: str) -> bool:
    """Return whether two names mean one host."""
    if one == other:
        return True
    (short, *domain), (other_short, *other_domain) = one.split(".", 1), other.split(".", 1)
    if short == other_short and (not domain or not other_domain):
        return True
    return bool(_addresses(one) & _addresses(other))


@functools.cache
def _addresses(host: str) -> frozenset[str]:
    """Return a host's addresses, without those that every machine has for itself."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return frozenset()
    return frozenset(str(address) for address in found if not str(address).startswith(("127.", "::1")))


def write_hostfile(path: Path, hosts: Sequence[str], nodefile: Path) -> None:
    """Write the lines of PBS's node file that name `hosts`, as often as it does."""
    lines = nodefile.read_text(encoding="utf-8").split()
    path.write_text("".join(f"{line}\n" for line in lines if line in hosts), encoding="utf-8")
