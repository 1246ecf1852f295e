"""Installation profiles: which lock files, what is built on the spot, what the site provides."""

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"


class InstallError(Exception):
    """An installation step failed; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One entry of `requirements/profiles.json`."""

    about: str
    requirements: tuple[str, ...]
    """Lock files; each package with its hashes."""
    source: tuple[str, ...] = ()
    """Lock files of source archives that are built against the target's torch and CUDA."""
    nvcc_hint: str = ""
    """What to do when there is no CUDA compiler."""
    system_torch: bool = False
    """Whether the interpreter's own torch is used."""
    exclude: tuple[str, ...] = ()
    """Patterns of locked packages that are left out."""

    def files(self) -> list[Path]:
        """Return all lock files."""
        return [REQUIREMENTS / name for name in (*self.requirements, *self.source)]

    def wheels_text(self) -> str:
        """Return the locked wheels, without the excluded ones, in pip's format."""
        paragraphs = []
        for name in self.requirements:
            text = (REQUIREMENTS / name).read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if not line.startswith("#")]
            paragraphs += "\n".join(lines).replace(" \\\n", " ").splitlines()
        kept = [line for line in paragraphs if not any(fnmatch.fnmatch(line.split("==")[0], p) for p in self.exclude)]
        return "\n".join(kept) + "\n"


def load_profiles() -> dict[str, Profile]:
    """Return all profiles by name."""
    entries: dict[str, dict[str, Any]] = json.loads((REQUIREMENTS / "profiles.json").read_text(encoding="utf-8"))
    return {name: Profile(**{key: frozen(value) for key, value in entry.items()}) for name, entry in entries.items()}


def frozen(value: Any) -> Any:
    """Return a list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def load_profile(name: str) -> Profile:
    """Return a profile.

    Raises: InstallError for an unknown one.
    """
    profiles = load_profiles()
    if name not in profiles:
        raise InstallError(f"--profile: {name!r} is not known. Use one of {', '.join(profiles)}.")
    return profiles[name]
