"""The Hugging Face Hub: push a model folder, in files of a bounded size, and fetch models and data sets.

A push is planned from the folder alone, without a network: which files go, and, where a weight file is larger than
allowed, which files take the weights' place (tensors unchanged). It is one commit; files that an interrupted push had
sent already are not sent again. An interrupted download resumes, and a downloaded model is checked.

The server is `HF_ENDPOINT`, the token `HF_TOKEN` or that of `hf auth login`, as huggingface_hub reads them.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.huggingface.companion_files import CARD
from megatron_cpt.checkpoint.huggingface.folder import HFFolder, OutputGroup, shards_of, write_safetensors
from megatron_cpt.checkpoint.huggingface.model_card import model_card, without_local_paths
from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.log import Progress, format_bytes

KINDS = ("model", "dataset")
_INDEX = "model.safetensors.index.json"
_HEADER_BYTES = 256
"""A tensor's entry in a header, at most: name, type, shape, offsets."""


@dataclass(frozen=True, kw_only=True)
class PushPlan:
    """Content of a push."""

    folder: Path
    files: tuple[tuple[str, int], ...]
    """(path in the repository, bytes) of the files that are sent unchanged."""
    new_shards: tuple[tuple[str, int], ...] = ()
    """(name, bytes) of the weight files that take the place of too large ones; their headers come on top."""
    replaced: tuple[str, ...] = ()
    """Weight files that stay here."""
    written: tuple[tuple[str, bytes], ...] = ()
    """(path in the repository, content) of files that are made or changed for the push: a model card, paths taken out."""

    @property
    def num_bytes(self) -> int:
        """Bytes to send, about."""
        return sum(size for _, size in (*self.files, *self.new_shards)) + sum(len(text) for _, text in self.written)

    def __str__(self) -> str:
        lines = [f"  {format_bytes(size):>10}  {name}" for name, size in self.files]
        lines += [f"  {format_bytes(size):>10}  {name} (made for the push)" for name, size in self.new_shards]
        lines += [f"  {format_bytes(len(text)):>10}  {name} (written for the push)" for name, text in self.written]
        if self.replaced:
            lines.append(f"  instead of {', '.join(self.replaced)}, larger than allowed")
        count = len(self.files) + len(self.new_shards) + len(self.written)
        return "\n".join([f"{self.folder}: {count} files, {format_bytes(self.num_bytes)}", *lines]) + "\n"


def check_repo_name(repo: str) -> None:
    """Raise CheckpointError when a name is none that the Hub takes."""
    parts = repo.split("/")
    if (
        len(parts) > 2
        or len(repo) > 96
        or "--" in repo
        or ".." in repo
        or not all(re.fullmatch(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", part, re.ASCII) for part in parts)
        or repo.endswith(".git")
    ):
        raise CheckpointError(
            f"--repo {repo}: is no name on the Hub. OWNER/NAME of letters, digits, '-', '_' and '.', without '--' or '..', "
            "and neither first nor last, is needed, 96 characters at most."
        )


def plan_push(
    folder: Path,
    max_shard_bytes: int,
    kind: str = "model",
    *,
    base: str | None = None,
    evaluation: Path | None = None,
) -> PushPlan:
    """Return what a push of `folder` would send; hidden files stay, and so do this machine's paths.

    A model without README.md gets a card: `base` names its base model, `evaluation` is a Markdown report that it quotes.

    Raises: CheckpointError when there is no such folder, or as a model it is damaged or incomplete.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder. A Hugging Face model folder is needed; `convert mcore-to-hf` writes one."
        )
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if kind == "dataset":
        return PushPlan(folder=folder, files=_sized(files, folder))
    model = HFFolder(folder, as_stored=True)
    weights = [file for file in model.files if file.suffix == ".safetensors"]
    written = without_local_paths(folder, [file.relative_to(folder).as_posix() for file in files])
    if not (folder / CARD).exists():
        written[CARD] = model_card(folder, base=base, evaluation=evaluation).encode()
    files = [file for file in files if file.relative_to(folder).as_posix() not in written]
    made = tuple(written.items())
    if all(file.stat().st_size <= max_shard_bytes for file in weights):
        return PushPlan(folder=folder, files=_sized(files, folder), written=made)
    shards = shards_of(_groups(model), _for_values(model, max_shard_bytes))
    left = [file for file in files if file not in weights and file.name != _INDEX]
    return PushPlan(
        folder=folder,
        files=_sized(left, folder),
        new_shards=tuple((name, sum(group.num_bytes for group in groups)) for name, groups in shards),
        replaced=tuple(file.name for file in weights),
        written=made,
    )


def push(
    plan: PushPlan,
    repo: str,
    max_shard_bytes: int,
    *,
    kind: str = "model",
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    api: Any = None,
) -> str:
    """Create the repository if need be and send the plan's files as one commit; return the commit's address.

    The folder is not changed; re-sharded weights are kept next to it until they are sent. `api` is an
    `huggingface_hub.HfApi`.

    Raises: CheckpointError when the server cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # heavy, and not needed for a plan

    check_repo_name(repo)

    api = api or HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _told_on_one_line("push", repo):
        # before any work: this fails at once without a network, a token or permission
        api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type=kind, exist_ok=True)
    with _new_shards(plan, max_shard_bytes) as extra, _told_on_one_line("push", repo):
        sent = [(name, plan.folder / name) for name, _ in plan.files] + [(path.name, path) for path in extra]
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in sent]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=text) for name, text in plan.written]
        commit = api.create_commit(
            repo,
            operations,
            commit_message=message or f"Upload {plan.folder.name}",
            repo_type=kind,
            revision=revision,
        )
    return str(commit.commit_url)


def download(
    repo: str,
    output: Path,
    *,
    kind: str = "model",
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    workers: int = 8,
    fetch: Callable[..., Any] | None = None,
) -> tuple[int, int]:
    """Fetch a repository's files into `output`; return their number and bytes. Files that are there already stay.

    `fetch` is `huggingface_hub.snapshot_download`. Raises: CheckpointError when the server cannot be reached or refuses, and
    when a fetched model is not whole.
    """
    if fetch is None:
        from huggingface_hub import snapshot_download  # heavy

        fetch = snapshot_download
    with _told_on_one_line("download", repo):
        fetch(
            repo,
            repo_type=kind,
            revision=revision,
            local_dir=str(output),
            allow_patterns=list(include) or None,
            ignore_patterns=list(exclude) or None,
            max_workers=workers,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    files = [path for path in output.rglob("*") if path.is_file() and ".cache" not in path.relative_to(output).parts]
    if not files:
        raise CheckpointError(f"{repo}: no file matches. Check --include and --exclude.")
    if kind == "model" and not include and not exclude and any(output.glob("*.safetensors")):
        HFFolder(output, as_stored=True)
    return len(files), sum(path.stat().st_size for path in files)


def _sized(files: Sequence[Path], folder: Path) -> tuple[tuple[str, int], ...]:
    return tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in files)


def _groups(model: HFFolder) -> list[OutputGroup]:
    """Return a group per tensor, so that one is in memory at a time for each worker."""
    return [
        OutputGroup(((name, model.shape(name), model.dtype(name)),), lambda name=name: [model.read(name)])  # type: ignore[misc]
        for name in model.names()
    ]


def _for_values(model: HFFolder, max_shard_bytes: int) -> int:
    """Return what a file of at most `max_shard_bytes` has for values: its header takes a line per tensor."""
    return max(max_shard_bytes - _HEADER_BYTES * len(model.names()), max_shard_bytes // 2)


@contextlib.contextmanager
def _new_shards(plan: PushPlan, max_shard_bytes: int) -> Iterator[list[Path]]:
    """Yield the weight files that take the place of too large ones; they are removed afterwards."""
    if not plan.new_shards:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix=f".{plan.folder.name}.", suffix=".partial", dir=plan.folder.parent) as name:
        progress = Progress("hub push: cutting", sum(size for _, size in plan.new_shards) / 1e6, "MB")
        model = HFFolder(plan.folder, as_stored=True)
        size = _for_values(model, max_shard_bytes)
        write_safetensors(
            Path(name), _groups(model), max_shard_bytes=size, progress=lambda done: progress.add(done / 1e6)
        )
        yield sorted(Path(name).iterdir())


@contextlib.contextmanager
def _told_on_one_line(what: str, repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises (HTTP errors, OSError, ValueError, its own) into one line with advice."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HTTPError, XetDownloadError

    try:
        yield
    except CptError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError, XetDownloadError) as problem:
        endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT)
        found = " ".join(str(problem).split())[:300] or type(problem).__name__
        advice = {
            "push": "Nothing here was changed. Give the same command where there is internet; --dry-run shows what it sends.",
            "download": "What was fetched stays. Give the same command again where there is internet; it resumes.",
        }[what]
        raise CheckpointError(
            f"hub {what} {repo}: {endpoint} refused or cannot be reached ({found}). A network, the right name and, for "
            f"private or new repositories, HF_TOKEN or `hf auth login` are needed. {advice}"
        ) from None
