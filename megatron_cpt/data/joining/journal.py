"""Progress of a merge of shards, on disk next to its output, so that a killed merge can resume."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.data.shards.indexed import bin_path, idx_path
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object, take_lock, write_json


class MergeJournal:
    """Progress of a merge, in `.<name>.merge.json` next to its output: the shards it joins and how many are on disk.

    Locked while a merge works; removed when it is done, kept when it is killed or fails.
    """

    def __init__(self, output: Path, prefixes: Sequence[Path]):
        self.output = output
        self.path = output.with_name(f".{output.name}.merge.json")
        self.lock_path = output.with_name(f".{output.name}.merge.lock")
        self.inputs = [_input_record(prefix) for prefix in prefixes]
        self.num_joined: dict[str, int] = {}
        """Shards whose bytes are on disk, by the name of the file that they are joined in."""

    def __enter__(self) -> "MergeJournal":
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock_path.open("w")
        if not take_lock(self.lock.fileno(), self.lock_path):
            self.lock.close()
            raise DataError(f"{self.output}: another process is merging it. Let it finish.")
        before = read_json_object(self.path, DataError) if self.path.exists() else None
        if before is not None and before["inputs"] == self.inputs:
            self.num_joined = before["num_joined"]
        elif before is None and (bin_path(self.output).exists() or idx_path(self.output).exists()):
            self.lock.close()
            raise DataError(f"{self.output}: exists already, without a manifest. Remove it or choose another output.")
        self.write()
        return self

    def write(self) -> None:
        """Put on disk how far the merge is."""
        write_json(self.path, {"inputs": self.inputs, "num_joined": self.num_joined})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.path.unlink()
            self.lock_path.unlink(missing_ok=True)
        self.lock.close()


def _input_record(prefix: Path) -> list[Any]:
    status = bin_path(prefix).stat()
    return [os.path.realpath(bin_path(prefix)), status.st_size, status.st_mtime_ns]
