"""Which code ran: the git revision, with a mark when the working tree differs from it."""

import subprocess
from pathlib import Path

from megatron_cpt import __version__


def code_revision() -> str:
    """Return `0.1.0 <commit>`, with `+changes` when tracked files differ from it; the version alone outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie below somebody else's repository
        return __version__
    try:
        commit = _git(root, "rev-parse", "HEAD")
        is_changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} {commit}{'+changes' if is_changed else ''}"


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()
