"""A real Slurm on the loopback interface: one machine posing as several nodes; needs root and Debian's slurm-wlm, munge.

    python -m tests.cluster.loopback_slurm up DIR [NODES]     then: export SLURM_CONF=DIR/slurm.conf
    python -m tests.cluster.loopback_slurm down DIR

Ports are free ones, so that several instances can live side by side. Only processes started here, known by their pid
files, are ever stopped. Node names are entered into /etc/hosts while the instance is up, because a job reaches its
first node by name.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_cpt.launch.node.rank import die_with_parent

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = "/usr/sbin:/sbin:" + os.environ.get("PATH", "/usr/bin:/bin")
CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge.sock
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
PlugStackConfig={dir}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
MinJobAge=86400
"""


def why_not() -> str | None:
    """Return why no Slurm can be started here; None when it can."""
    if os.geteuid() != 0:
        return "a loopback Slurm needs root"
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install -y --no-install-recommends slurm-wlm munge"
    return None


def start(directory: Path, num_nodes: int = 2, name: str = "cpt", *, outlive: bool = True) -> dict[str, str]:
    """Start the daemons; return the environment in which Slurm's commands reach them.

    `outlive`: whether they go on when this process ends; otherwise they end with it, even when it is killed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    (directory / "state").mkdir(exist_ok=True)
    nodes = [f"{name}{number}" for number in range(1, num_nodes + 1)]
    ports = _free_ports(num_nodes + 1)
    text = CONFIGURATION.format(dir=directory, host=os.uname().nodename, controller_port=ports[0])
    for node, port in zip(nodes, ports[1:], strict=True):
        text += f"NodeName={node} NodeHostname={os.uname().nodename} NodeAddr=127.0.0.1 Port={port} CPUs=64\n"
    text += f"PartitionName=debug Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP\n"
    (directory / "slurm.conf").write_text(text)
    (directory / "plugstack.conf").write_text("")
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    with Path("/etc/hosts").open("a") as hosts:
        hosts.writelines(f"127.0.0.1 {node} # {directory}\n" for node in nodes)
    environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf"), "PATH": PATH}
    files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
    options = [f"--{option}={directory / file}" for option, file in files.items()]
    # Daemons in the background hold whatever they inherit: give them no pipe of ours.
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    commands = [["munged", "--force", *options, f"--seed-file={directory / 'munge.seed'}"], ["slurmctld"]]
    for command in [*commands, *(["slurmd", "-N", node] for node in nodes)]:
        if outlive:
            subprocess.run(command, check=True, **quiet)
            continue
        foreground = "--foreground" if command[0] == "munged" else "-D"
        subprocess.Popen([*command, foreground], preexec_fn=die_with_parent, start_new_session=True, **quiet)
        if command[0] == "munged":
            _wait_for(directory / "munge.sock")
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        listed = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
        if listed.stdout.split().count("idle") == num_nodes:
            return environment
        time.sleep(0.2)
    stop(directory)
    logs = "".join(path.read_text()[-500:] for path in directory.glob("*.log"))
    raise RuntimeError(f"the loopback Slurm's nodes did not come up:\n{logs}")


def stop(directory: Path) -> None:
    """Cancel all jobs, stop the daemons started in `directory`, take the nodes out of /etc/hosts."""
    environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf"), "PATH": PATH}
    with contextlib.suppress(subprocess.TimeoutExpired):
        if subprocess.run(["scontrol", "ping"], env=environment, capture_output=True, timeout=10).returncode == 0:
            subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=10)
            for _ in range(50):
                queue = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, timeout=10)
                if not queue.stdout.strip():
                    break
                time.sleep(0.2)
    for pattern, name in (("slurmd.*.pid", "slurmd"), ("slurmctld.pid", "slurmctld"), ("munged.pid", "munged")):
        for path in directory.glob(pattern):
            _stop_process(path, name)
    hosts = Path("/etc/hosts")
    kept = [line for line in hosts.read_text().splitlines(True) if not line.rstrip().endswith(f"# {directory}")]
    hosts.write_text("".join(kept))


def _stop_process(pid_path: Path, name: str) -> None:
    pid = int(pid_path.read_text().strip() or 0)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(50):
            try:
                if Path(f"/proc/{pid}/comm").read_text().strip() != name:
                    return
                if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    return
                os.kill(pid, number)
            except (FileNotFoundError, ProcessLookupError):
                return
            time.sleep(0.1)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("up", "down"):
        sys.exit(__doc__)
    reason = why_not()
    if reason:
        sys.exit(reason)
    if sys.argv[1] == "up":
        start(Path(sys.argv[2]).absolute(), int(sys.argv[3]) if len(sys.argv) > 3 else 2)
        sys.stdout.write(f"export SLURM_CONF={Path(sys.argv[2]).absolute()}/slurm.conf\n")
    else:
        stop(Path(sys.argv[2]).absolute())
