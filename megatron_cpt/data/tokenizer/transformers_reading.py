"""A tokenizer's folder as transformers reads it: length, added tokens, ids of probe texts, and the whole definition.

transformers is imported in a process of its own, where it is not imported already: it takes seconds, torch comes with
it, and `tokenize` forks workers. Its result is kept in the user's cache, under a hash of the folder's files and its
version. Code in a tokenizer's folder is never executed.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import megatron_cpt
from megatron_cpt.data.tokenizer.folder import ADDED, CONFIG, SPECIAL_MAP, VOCABULARIES
from megatron_cpt.errors import DataError
from megatron_cpt.files import file_hash, write_text

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Version of the cached result; another version is recomputed."""
_SECONDS = 600
_FILES = (*VOCABULARIES, CONFIG, SPECIAL_MAP, ADDED, "config.json")
_MAX_PROBED_TOKENS = 4000
_PROBES = (
    "The quick brown fox doesn't jump.\n\n  def f(x):\n\treturn x**2  # twice\r\n",
    " leading and trailing  spaces   ",
    "3.14159 1,000,000 ١٢٣ ½ x² e\u0301 é Å \u212b ﬁ ß İ",
    "人工知能の研究は、言葉から。中文文本没有空格。한국어 문장입니다.",
    "हिन्दी ไทย العربية עברית русский ελληνικά 😀👩\u200d👩\u200d👧",
    "\u00a0\u3000\u200b\ufeff\x00\x7f\u2028",
    "<|endoftext|> <s> </s> [INST] <unk> <pad> ▁ Ġ <0x0A>",
    "",
)


def transformers_reading(folder: Path, *, needs_definition: bool = False) -> dict[str, Any]:
    """Return what transformers makes of a tokenizer's folder.

    `class`, `length`, `added` (id, content and whether it is special, of each added token), `texts` and `ids` (probes, without
    special tokens around them), `prefix` (ids that are put before a text), `eos_token`, `is_fast`, and if asked for
    `definition` (its `tokenizer.json`); or `error` alone, when it refuses.

    Raises: DataError when transformers cannot be asked at all.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"{folder}: transformers is not installed. It says how the folder is read. Install it."
        ) from None
    path = _cache_path(folder, version)
    with contextlib.suppress(OSError, ValueError):
        kept = dict(json.loads(path.read_text(encoding="utf-8")))
        if needs_definition:
            kept["definition"] = _definition_path(path).read_text(encoding="utf-8")
        return kept
    found = read(folder) if "transformers" in sys.modules else _ask(folder)
    if "error" in found:  # a refusal may have passing causes
        return found
    definition = found.pop("definition")
    try:
        write_text(_definition_path(path), definition)
        write_text(path, json.dumps(found))
    except OSError as problem:
        logger.debug("%s: not kept (%s)", path, problem.strerror)
    return found | ({"definition": definition} if needs_definition else {})


def read(folder: Path) -> dict[str, Any]:
    """Ask transformers, in this process."""
    from transformers import AutoTokenizer  # heavy: torch comes with it

    environment = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # a process with threads cannot be forked
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # transformers raises what it meets
        reason = " ".join(str(problem).split())[:240]
        return {"error": f"{type(problem).__name__}: {reason}"}
    finally:
        os.environ.clear()
        os.environ.update(environment)
    tokenizer.model_max_length = int(1e30)
    added = {int(id): token for id, token in tokenizer.added_tokens_decoder.items()}
    texts = [*_PROBES, *_around([token.content for token in added.values()][:_MAX_PROBED_TOKENS])]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "class": type(tokenizer).__name__,
        "length": len(tokenizer),
        "added": {id: [token.content, token.special] for id, token in sorted(added.items())},
        "texts": texts,
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "prefix": _prefix(tokenizer),
        "eos_token": None if tokenizer.eos_token is None else str(tokenizer.eos_token),
        "is_fast": backend is not None,
        "definition": "" if backend is None else backend.to_str(),
    }


def _around(tokens: list[str]) -> list[str]:
    """Return texts with each token at an edge, between letters, and between spaces."""
    return [f"{token}a{token}b {token} c\n{token}\n d{token}" for token in tokens]


def _prefix(tokenizer: Any) -> list[int]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def _ask(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, os.fspath(folder.absolute())]
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(megatron_cpt.__file__).parent.parent), os.environ.get("PYTHONPATH")])
    )
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise DataError(f"{folder}: transformers could not be asked how it is read ({problem}). Try again.") from None
    try:
        return dict(json.loads(answer.stdout))
    except ValueError:
        last = (answer.stderr.decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
        raise DataError(
            f"{folder}: transformers could not be asked how it is read ({last[:300]}). Check `megatron-cpt doctor --deep`."
        ) from None


def _cache_path(folder: Path, version: str) -> Path:
    digest = hashlib.blake2b(f"{_FORMAT} {version}\n".encode(), digest_size=16)
    names = sorted(
        {*_FILES, *(path.name for path in folder.glob("*.model")), *(p.name for p in folder.glob("*.tiktoken"))}
    )
    for name in names:
        if (folder / name).is_file():
            digest.update(f"{name} {file_hash(folder / name)}\n".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "megatron-cpt" / "tokenizers" / f"{digest.hexdigest()}.json"


def _definition_path(path: Path) -> Path:
    return path.with_name(path.stem + ".tokenizer.json")


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # no tokenizer needs it, and it takes two thirds of the time
    sys.stdout.write(json.dumps(read(Path(sys.argv[1]))))
