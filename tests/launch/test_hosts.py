"""A rendezvous host without an address is named within a stated time."""

import os
import socket
import subprocess
import sys
import time

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node import hosts


def test_a_host_without_address_is_named_in_time(monkeypatch):
    calls = []

    def unknown(host, port):
        calls.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    started = time.monotonic()
    with pytest.raises(LaunchError, match=r"MASTER_ADDR: 'node-7' has no address on .* tried for 1 s"):
        hosts.wait_for_name("node-7", seconds=1)
    assert time.monotonic() - started < 5 and len(calls) > 1


def test_a_host_that_is_known_after_a_moment_is_taken(monkeypatch):
    answers = iter([socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), None])

    def late(host, port):
        if (answer := next(answers)) is not None:
            raise answer
        return []

    monkeypatch.setattr(socket, "getaddrinfo", late)
    hosts.wait_for_name("node-7", seconds=30)


def test_a_nodes_torchrun_exits_2_with_one_line(monkeypatch):
    code = "import sys; from megatron_cpt.launch.node import hosts, torchrun; hosts.wait_for_name.__defaults__ = (0.2,); torchrun.main([])"
    environment = {**os.environ, "MASTER_ADDR": "no-such-host.invalid", "SLURM_NODEID": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 2
        and "'no-such-host.invalid' has no address" in done.stderr
        and "Traceback" not in done.stderr
    )
