"""A cleaning task and its output folder: started once, resumed after a kill, recognised when it is finished.

While a task runs, its settings and inputs are in `<work>/task.json`; `output/report.json` appears last and carries the
task's hash. So the same command again resumes or returns the finished result, and another command never overwrites it.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.data.reading.byproducts import rejects_beside, remove_partials, write_record
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object, take_lock, text_hash, write_json

logger = logging.getLogger(__name__)

REPORT = "report.json"


class CleaningTask:
    """One task with its output and work folder. A context: it holds the work folder for itself until it is left."""

    def __init__(
        self,
        kind: str,
        output: Path,
        corpora: Mapping[str, Sequence[Source]],
        settings: Mapping[str, Any],
        work: Path | None = None,
    ):
        self.work = work or output.with_name(f".{output.name}.work")
        """Folder for temporary data and counts, by default next to the output."""
        self._kind, self._report = kind, output / REPORT
        sources = {name: [source.identity() for source in group] for name, group in corpora.items()}
        self._record = {**settings, "sources": sources}
        self._hash = text_hash(json.dumps([kind, settings, sources], sort_keys=True, default=str))
        """Identity of a task: verb, options, and name, size and time of every input."""
        self._lock: int | None = None

    def __enter__(self) -> "CleaningTask":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def begin(self, targets: Sequence[Path], is_part: bool = False) -> dict[str, Any] | None:
        """Claim the output and work folders for this task, or resume in them; return the report of a finished task.

        `is_part`: others work on parts of it at the same time.

        Raises: DataError when they hold other work, or a target exists.
        """
        if self._report.exists():
            return self._done(targets)
        path = self.work / "task.json"
        if not path.exists():
            if taken := next((target for target in targets if target.exists()), None):
                raise DataError(f"{taken}: exists already, from other work. Remove it or choose another output folder.")
        elif read_json_object(path, DataError)["task"] != self._hash:
            raise DataError(
                f"{self.work}: holds unfinished work on other inputs or with other options. Remove it, or choose another output."
            )
        self._take_lock(is_part)
        if not path.exists():
            write_json(path, {"task": self._hash, **self._record})
        remove_partials([self._report, *targets, *map(rejects_beside, targets)])
        return None

    def finish(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Write the report, which marks the task as finished, and remove the work folder; return the report."""
        written = write_record(self._report, f"{self._kind} report", {"task": self._hash, **report})
        shutil.rmtree(self.work)
        return json.loads(json.dumps(written))

    def _done(self, targets: Sequence[Path]) -> dict[str, Any]:
        found = read_json_object(self._report, DataError)
        if not isinstance(found, dict) or found.get("task") != self._hash:
            raise DataError(
                f"{self._report}: exists already, from other inputs or options. Remove the folder or choose another output."
            )
        if missing := next((target for target in targets if not target.exists()), None):
            raise DataError(
                f"{missing}: is gone, and {self._report} says that it was written. Remove the folder and run again."
            )
        shutil.rmtree(self.work, ignore_errors=True)
        return found

    def _take_lock(self, is_shared: bool) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        if not take_lock(self._lock, self.work, is_shared):
            raise DataError(f"{self.work}: another process is at this work. Let it finish, or stop it first.")
