"""How a run was named on the command line, found again in its ledger and its resolved configuration."""

import re
import shlex
from pathlib import Path

from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import read_jobs

NAMES = ("--task", "--params", "--size", "--site")
_COMMAND_LINE = re.compile(r"^  (\w+): (.*)  # command line$")


def run_names(run: RunDir, fallback: dict[str, str]) -> list[str]:
    """Return `--task ... --params ... --size ... [--site ...]` of the newest training job, else from `fallback`."""
    found = dict(fallback)
    for record in read_jobs(run.jobs).values():
        if record.get("stage") == "train":
            found |= _names(_words(record))
    return [word for name in NAMES if found.get(name) for word in (name, found[name])]


def command_line_settings(config_path: Path) -> dict[str, str]:
    """Return dotted key -> YAML text of the settings that came from the command line, from a resolved configuration."""
    settings, section = {}, ""
    for line in config_path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(" "):
            section = line.partition(":")[0]
        elif match := _COMMAND_LINE.match(line):
            settings[f"{section}.{match[1]}"] = match[2]
    return settings


def _words(record: dict) -> list[str]:
    script = Path(str(record.get("script", "")))
    if script.is_file():
        return shlex.split(script.read_text(encoding="utf-8").replace("\\\n", " "), comments=True)
    return [str(word) for word in record.get("command", [])]


def _names(words: list[str]) -> dict[str, str]:
    return {words[at]: words[at + 1] for at in range(len(words) - 1) if words[at] in NAMES}
