"""The table of a folder's checkpoints, from their manifests alone: no torch, each manifest read once."""

from pathlib import Path

from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.errors import CheckpointError
from megatron_cpt.log import aligned, format_bytes, format_count


def checkpoint_table(root: Path, protected: set[int]) -> str:
    """Return a table of the checkpoints in `root`: iteration, tokens, bytes, content, whether protected or tracked."""
    tracked = mcore.read_tracker(root)
    rows = [("iteration", "tokens", "size", "content", "note")]
    for iteration in mcore.iterations_on_disk(root):
        try:
            manifest = mcore.read_manifest(mcore.checkpoint_dir(root, iteration))
        except CheckpointError:
            continue  # an unfinished save, or damage: `checkpoint verify` says which
        notes = ["latest"] if iteration == tracked else []
        notes += ["protected"] if iteration in protected else []
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        rows.append(
            (
                str(iteration),
                format_count(manifest.get("consumed_tokens") or 0),
                format_bytes(size),
                str(manifest.get("content", "")),
                " ".join(notes),
            )
        )
    return aligned(rows)
