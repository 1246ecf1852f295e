"""One thread for the libraries of tokenizers: a process that has started others cannot be forked."""

import contextlib
import os
from collections.abc import Iterator

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1"}
"""Environment that keeps the engines to one thread in each worker; fastokens has threads of its own besides rayon's."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep the engines that are loaded here to one thread: a process that has others cannot be forked."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
