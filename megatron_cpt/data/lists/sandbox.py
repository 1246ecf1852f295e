"""A command without network, without rights to write anything, and with a limit of time and memory; Linux only.

The command runs in namespaces of its own (user, mounts, network, processes): every mount is read-only, `/run` with its sockets
is empty, the user is nobody, other processes are out of reach. Nothing is installed and no rights are needed where the kernel
lets users have namespaces. This file is also the program that sets them up and becomes the command.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

_REFUSED = 97
_MEMORY_BYTES = 2 << 30
_NOBODY = 65534
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG = 1
_MS_REC_PRIVATE = (1 << 14) | (1 << 18)


class SandboxError(Exception):
    """This machine does not let a user make a sandbox."""


def run_in_sandbox(
    command: Sequence[str], environment: Mapping[str, str], seconds: int
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a sandbox and return what it wrote.

    Raises: SandboxError saying why there is none, subprocess.TimeoutExpired.
    """
    done = subprocess.run(
        [sys.executable, "-I", __file__, str(seconds), *command],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds + 5,
        check=False,
    )
    if done.returncode == _REFUSED:
        raise SandboxError(done.stderr.decode(errors="replace").strip())
    return done


def _enter() -> None:
    """Leave the machine's network, processes and writable files for namespaces of our own. Raises: OSError."""
    uid, gid = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWIPC)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{_NOBODY} {uid} 1"), ("gid_map", f"{_NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.mount(None, b"/", None, _MS_REC_PRIVATE, None))
    if os.path.isdir("/run"):
        _check(libc.mount(b"none", b"/run", b"tmpfs", 0, b"size=4k"))
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    _check(libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.sizeof(attributes)))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _main(seconds: int, command: list[str]) -> int:
    try:
        _enter()
    except OSError as problem:
        sys.stderr.write(f"no namespaces for users here: {problem.strerror}\n")
        return _REFUSED
    child = os.fork()  # the first process of its namespace: when it ends, all that it started ends
    if not child:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        os.execvp(command[0], command)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2:]))
