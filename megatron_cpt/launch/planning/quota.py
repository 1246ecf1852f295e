"""Remaining quota of a user or a group on a file system, from the commands that sites provide.

Lustre answers `lfs quota`, other file systems `quota -w`. A site without either has no quota that can be seen here, and
the free space of the file system is all there is to say.
"""

import grp
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SECONDS = 10
_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Quota:
    """A limit that has been set."""

    owner: str
    """`user NAME` or `group NAME`."""
    used_bytes: int
    limit_bytes: int

    @property
    def left_bytes(self) -> int:
        """Bytes that can still be written, not below 0."""
        return max(self.limit_bytes - self.used_bytes, 0)


def tightest_quota(path: Path) -> Quota | None:
    """Return the quota on the file system of `path` (or of its nearest existing parent) that leaves least.

    None where no quota is set, or none can be asked for.
    """
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return min(_quotas(path), key=lambda quota: quota.left_bytes, default=None)


def _quotas(path: Path) -> Iterator[Quota]:
    user, group = _name(pwd.getpwuid, os.getuid()), _name(grp.getgrgid, path.stat().st_gid)
    for owner, lustre, linux in ((f"user {user}", "-u", "-u"), (f"group {group}", "-g", "-g")):
        name = owner.split(" ", 1)[1]
        if shutil.which("lfs"):
            yield from _parsed(_output(["lfs", "quota", "-q", lustre, name, str(path)]), None, owner)
        if shutil.which("quota"):
            yield from _parsed(_output(["quota", "-w", "-p", linux, name]), _device(path), owner)


def _name(look_up: Callable[[int], Any], number: int) -> str:
    """Return the name of a user or group, or its number where it has none (in containers): both commands take either."""
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)


def _output(command: list[str]) -> str:
    """Return what the command wrote; `quota` exits 1 where a quota is exceeded."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _parsed(text: str, device: str | None, owner: str) -> Iterator[Quota]:
    """Yield the limits in lines `<file system> <KiB used> <soft limit> <hard limit> ...`; 0 means none.

    lfs wraps after a long path and marks what is exceeded with `*`.
    """
    for match in re.finditer(r"^\s*(\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s", text + "\n", re.MULTILINE):
        limits = [int(limit) for limit in match.groups()[2:] if int(limit)]
        if limits and device in (None, match[1]):
            yield Quota(owner=owner, used_bytes=int(match[2]) * _KIB, limit_bytes=min(limits) * _KIB)


def _device(path: Path) -> str:
    """Return what is mounted where `path` lies."""
    mounts = [line.split()[:2] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    holding = [(place, device) for device, place in mounts if path.resolve().is_relative_to(place)]
    return max(holding, key=lambda mount: len(mount[0]))[1]
