"""LLM-jp's shell data lists evaluated by bash in a sandbox, for syntax that `shell.py` does not support."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.lists.formats import entries_of_words
from megatron_cpt.data.lists.sandbox import SandboxError, run_in_sandbox
from megatron_cpt.errors import DataError

_SECONDS = 20
_NAME = re.compile(
    r"^[ \t]*(?:export\s+|readonly\s+|declare\s+(?:-\w+\s+)*)?(\w+)\+?=\(|\b(\w*DATA_PATH)\+?=", re.MULTILINE
)
_VARIABLE = re.compile(r"\$\{?(\w+)")
_SCRIPT = """
set -u
for cpt_found in $3; do declare "$cpt_found="; done; unset cpt_found
source "$1" > /dev/null || true
declare -n cpt_found="$2"
if [[ "$(declare -p "$2" 2> /dev/null)" =~ ^declare\\ -[a-zA-Z]*a ]]; then printf '%s\\0' "${cpt_found[@]}"; else printf '%s' "$cpt_found"; fi
"""


def evaluate_shell_list(path: Path, array: str | None = None) -> list[DataEntry]:
    """Return the list that bash makes of a shell file; `array` names the variable that holds it.

    The file runs without network, without rights to write, for 20 seconds at most. Of the environment it sees `PATH` and the
    variables that it names.

    Raises: DataError where nothing can be sandboxed (with the command for those who trust the file), for an error of bash, and
    where several arrays could be meant.
    """
    text = _text(path)
    names = list(dict.fromkeys(first or second for first, second in _NAME.findall(text)))
    name = array or _chosen(names, path)
    grown = [found for found in names if found.endswith("DATA_PATH")]
    wanted = {"PATH", "LANG", *_VARIABLE.findall(text)}
    environment = {key: value for key, value in os.environ.items() if key in wanted}
    words = [str(path.resolve()), name, " ".join(grown)]
    try:
        done = run_in_sandbox(["bash", "--noprofile", "--norc", "-c", _SCRIPT, "list", *words], environment, _SECONDS)
    except FileNotFoundError:
        raise DataError(
            f"{path}: bash is not installed, which --evaluate-shell asks. {_one_liner(path, name)}"
        ) from None
    except SandboxError as problem:
        raise DataError(
            f"{path}: cannot be evaluated safely on this machine ({problem}). {_one_liner(path, name)}"
        ) from None
    except subprocess.TimeoutExpired:
        raise DataError(f"{path}: takes more than {_SECONDS} seconds. A list is needed, not a program.") from None
    complaint = " ".join(done.stderr.decode(errors="replace").split())
    if done.returncode or not done.stdout.strip(b"\0 \n"):
        raise DataError(
            f"{path}: bash leaves nothing in {name} ({complaint or 'no error'}). Mend the list, or name its --array."
        )
    if complaint:
        raise DataError(f"{path}: bash says: {complaint}. Mend the list; half of one may be missing.")
    return entries_of_words([(0, word) for word in _words(done.stdout.decode())], str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: not a text file that can be read ({problem}). A data list is needed.") from None


def _chosen(names: Sequence[str], path: Path) -> str:
    if "TRAIN_DATA_PATH" in names:
        return "TRAIN_DATA_PATH"
    if len(names) != 1:
        found = f"assigns {', '.join(names)}" if names else "assigns no array"
        raise DataError(f"{path}: {found}. One list is needed. Name its variable with --array.")
    return names[0]


def _words(output: str) -> list[str]:
    words = [word for word in (output.split("\0") if "\0" in output else output.split()) if word]
    return words[1:] if words[:1] in (["--data-path"], ["--train-data-path"]) else words


def _one_liner(path: Path, name: str) -> str:
    script = f'source {shlex.quote(str(path))}; echo "export {name}=("; printf "%s %s\\n" "${{{name}[@]}}"; echo ")"'
    return f"Where you trust the file: bash -c {shlex.quote(script)} > list.sh, and convert list.sh."
