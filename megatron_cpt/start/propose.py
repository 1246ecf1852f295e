"""Settings for a model, a number of tokens and a machine: sequence, batch, learning rate, nodes and layout.

They are the starting point of a search, not its result: batch and rate follow the size of the model as the params files
of `params/` do (peaks for continual pre-training of a finished model, about a tenth of the peak of its training), the
layout comes from the planner's search.
"""

import dataclasses
import os
import shutil
import subprocess
from dataclasses import dataclass

from megatron_cpt.config.settings.schema import ModelConfig, RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.launch.planning.model_size import num_parameters
from megatron_cpt.launch.planning.plan import GIB
from megatron_cpt.launch.planning.search import Layout, search_layouts

_BY_SIZE = (
    (1e8, 1e-3, 1 << 14),
    (1e9, 2e-4, 1 << 19),
    (5e9, 5e-5, 1 << 22),
    (2e10, 3e-5, 1 << 22),
    (1e99, 1e-5, 1 << 22),
)
"""Parameters below, peak learning rate, tokens of a batch."""
MOST_NODES = 512
FEWEST_ITERATIONS = 100
"""A stage has at least so many steps: a schedule has to be followed by something."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Resources for training: ranks of a node, and the memory of one."""

    ranks_per_node: int
    gpu_memory_gib: float | None
    """None: a CPU."""
    found: str
    """How this is known, for the file's comment."""


def machine_of(site_memory: float | None, site_ranks: int | None) -> Machine:
    """Return what trains: the site's nodes, else the GPUs of this machine, else its cores.

    Raises: ConfigError for a site that does not say how much memory its GPUs have.
    """
    if site_ranks is not None:
        if site_memory is None:
            raise ConfigError(
                "site.gpu_memory_gib: not stated. The layout needs it. Add it to the site file, or give --gpu-memory."
            )
        return Machine(ranks_per_node=site_ranks, gpu_memory_gib=site_memory, found="the site file")
    memories = _local_gpus()
    if memories:
        memory = min(memories) if site_memory is None else site_memory
        return Machine(ranks_per_node=len(memories), gpu_memory_gib=memory, found="this machine's GPUs")
    ranks = 2 if len(os.sched_getaffinity(0)) > 1 else 1
    return Machine(ranks_per_node=ranks, gpu_memory_gib=site_memory, found="this machine's cores")


def length_and_batch(model: ModelConfig, tokens: int, seq_length: int | None = None) -> tuple[int, int, float]:
    """Return seq_length, global_batch_size (a power of two) and the peak learning rate.

    Raises: ConfigError when the tokens do not make a stage.
    """
    parameters = num_parameters(model)
    _, lr, batch_tokens = next(row for row in _BY_SIZE if parameters < row[0])
    length = min(model.max_position_embeddings, seq_length or (4096 if parameters < 3e9 else 8192))
    batch = min(batch_tokens // length, tokens // (FEWEST_ITERATIONS * length))
    if batch < 2:
        raise ConfigError(
            f"--tokens {tokens}: fewer than {FEWEST_ITERATIONS} steps of two sequences of {length} tokens "
            f"({2 * FEWEST_ITERATIONS * length}). Give more tokens, or a smaller --seq-length."
        )
    return length, 1 << (batch.bit_length() - 1), lr


def layout_for(config: RunConfig, machine: Machine) -> tuple[RunConfig, str]:
    """Return `config` on the fewest nodes (a power of two) that hold it, in the search's first layout, and a note.

    Raises: ConfigError when nothing fits.
    """
    if machine.gpu_memory_gib is None:
        ranks = min(machine.ranks_per_node, config.training.global_batch_size)
        launch = dataclasses.replace(config.launch, nodes=1, gpus_per_node=ranks)
        micro = min(config.training.global_batch_size // ranks, 8)
        training = dataclasses.replace(config.training, micro_batch_size=micro, precision="fp32")
        return dataclasses.replace(config, launch=launch, training=training), f"{ranks} processes on {machine.found}"
    memory = int(machine.gpu_memory_gib * GIB)
    nodes = 1
    while nodes <= MOST_NODES:
        launch = dataclasses.replace(config.launch, nodes=nodes, gpus_per_node=machine.ranks_per_node)
        found = _best(dataclasses.replace(config, launch=launch), memory)
        if found is not None:
            note = (
                f"`plan --search` for {nodes} x {machine.ranks_per_node} GPUs of {machine.gpu_memory_gib:g} GiB "
                f"({machine.found}): {found.peak_bytes / GIB:.1f} GiB a GPU"
            )
            return found.config, note
        nodes *= 2
    raise ConfigError(
        f"no layout of up to {MOST_NODES} nodes of {machine.ranks_per_node} GPUs of {machine.gpu_memory_gib:g} GiB holds "
        "the model with this batch. Give larger GPUs with --gpu-memory, or more tokens."
    )


def _best(config: RunConfig, memory: int) -> Layout | None:
    layouts = search_layouts(config, memory)
    return layouts[0] if layouts else None


def _local_gpus() -> list[float]:
    """Return the memory of each of this machine's GPUs in GiB, from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return [int(line) / 1024 for line in answer.stdout.split() if line.isdigit()] if answer.returncode == 0 else []
