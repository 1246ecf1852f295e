"""Skip options of a conversion, stored so that its inverse does not need them again.

The manifest of a checkpoint and the `conversion.json` of an exported folder hold it under `options`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONVERSION = "conversion.json"
OPTIONS = "options"


@dataclass(frozen=True)
class ImportOptions:
    """Keys of config.json that change nothing, and globs of tensors that are left out."""

    ignore_config: tuple[str, ...] = ()
    skip_tensors: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "ImportOptions":
        """Return the options that a manifest or a conversion's record holds; none where it has none."""
        kept = record.get(OPTIONS) or {}
        return cls(tuple(kept.get("ignore_config") or ()), tuple(kept.get("skip_tensors") or ()))

    def joined(self, ignore_config: Sequence[str], skip_tensors: Sequence[str]) -> "ImportOptions":
        """Return these options and more, each once and in order."""
        return ImportOptions(
            tuple(sorted({*self.ignore_config, *ignore_config})), tuple(sorted({*self.skip_tensors, *skip_tensors}))
        )

    def record(self) -> dict[str, Any]:
        """Return the entry for a manifest, empty where there is nothing to remember."""
        if not self.ignore_config and not self.skip_tensors:
            return {}
        return {OPTIONS: {"ignore_config": list(self.ignore_config), "skip_tensors": list(self.skip_tensors)}}
