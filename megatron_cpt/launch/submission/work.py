"""One piece of work for an executor: which verb, on what, after what, from which inputs."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link of a chain of training jobs."""

    number: int
    is_last: bool = True
    """Exit code 3 if the run is not finished after it: jobs that depend on the run must not start."""
    max_failures: int = 2
    """Links in a row without progress that break the chain."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One node of a graph, or a job of its own."""

    name: str
    """Unique in the graph and in the ledger: `tokenize-D0`, `train` ..."""
    stage: str
    """Kind, as in the site file's `stages`."""
    words: tuple[str, ...]
    """`megatron-cpt` WORDS."""
    needs: tuple[str, ...] = ()
    """Names of the work that must have finished."""
    on_ranks: bool = False
    """On every rank of a training job; else once, on one node."""
    num_array_tasks: int | None = None
    link: Link | None = None
    """Of training; None: a job of its own."""
    reads: tuple[str, ...] = ()
    """Files, folders and globs that it is made of."""
    writes: tuple[str, ...] = ()
    """Files and folders that it makes."""
    joined_by: str | None = None
    """Name of the work that joins its results, removes them, and therefore represents them."""
    points: str | None = None
    """Sweep: file with the table of the runs of the array's tasks."""
    fields: dict[str, object] = field(default_factory=dict)
    """More for the ledger."""
