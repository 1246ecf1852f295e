"""Program that a launcher starts once per node: torchrun with this node's rank, read from any supported launcher.

python -m megatron_cpt.launch.node.torchrun TORCHRUN_ARGUMENT ...
"""

import os
import sys
from collections.abc import Mapping

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node.hosts import wait_for_name

_SOURCES = ("SLURM_NODEID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID")


def node_rank(environment: Mapping[str, str]) -> int:
    """Return this node's rank among the job's nodes.

    Raises: LaunchError when no known launcher started this process.
    """
    for name in _SOURCES:
        if environment.get(name):
            return int(environment[name])
    raise LaunchError(
        f"launcher: none of {', '.join(_SOURCES)} is set. srun or mpirun must start one process per node."
    )


def main(argv: list[str]) -> None:
    """Become torchrun, once the host that it will meet the others at is known: torchrun itself tries for ever, silently."""
    if os.environ.get("MASTER_ADDR"):
        try:
            wait_for_name(os.environ["MASTER_ADDR"])
        except LaunchError as problem:
            sys.stderr.write(f"megatron-cpt: {problem}\n")
            sys.exit(2)
    program = [sys.executable, "-m", "torch.distributed.run", f"--node-rank={node_rank(os.environ)}", *argv]
    os.execv(sys.executable, program)


if __name__ == "__main__":
    main(sys.argv[1:])
