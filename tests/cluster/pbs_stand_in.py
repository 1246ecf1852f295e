"""A stand-in for PBS Professional's qsub, qstat and qdel; not PBS, but it has the manners seen on OpenPBS 23.06.

    qsub [-W depend=...] SCRIPT      qstat [-x] -f -F json ID...      qselect [-x] [-N NAME]      qdel ID...

`install(directory)` writes the three commands. Jobs really run, one process each, when their dependencies allow: qsub
leaves a keeper process per job that waits, runs the script and notes its end. Facts that it follows: ids `0.pbs1` and
`20[].pbs1`; exit 2 for a bad option, directive or a script's argument, 166 for a bad walltime, 170 for an unknown queue,
1 for a missing script; a dependency on an unknown or failed job is taken, and the job deleted later without running; a
failed `afterok` parent deletes its dependents; a missing log folder holds the job; directives end at the first command;
the job starts in $HOME with OMP_NUM_THREADS=192, umask 0077 and a node file that repeats its hosts; qdel gives 271.
`qstat` shows live jobs, an ended one gives 35 (`Job has finished`), with -x ended ones too.

`behave(directory, ...)` makes the server behave as servers were seen to (issue "Launch tells the truth on real schedulers"):

    history=False    job_history_enable is false, OpenPBS's own default: `qstat -x -f -F json ID` answers 0 without `Jobs` even
                     for running jobs, and `qstat ID` of an ended one 153
    server="down"    the server is stopped: every command says `cannot connect to server` and gives 255
    qsub="silent"    the job is taken, and qsub ends without its answer (`End of File`, 1), as in a time-out
    qsub="lost"      the connection breaks before the job is taken, with the same words
    qsub="notice"    a site's notice follows the id
    exit_status=-29  what PBS says of a job that was killed at its walltime, also where it had saved and ended well
    nodes=[...]      names in the node file
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ.get("PBS_STAND_IN", "/nonexistent"))
QUEUES = ("workq", "rt_HF")
RANKS_PER_HOST = 8


def install(directory: Path) -> Path:
    """Write the commands into `directory/bin`; return that folder. PBS_STAND_IN must name `directory`."""
    commands = directory / "bin"
    commands.mkdir(parents=True)
    (directory / "jobs").mkdir()
    for name in ("qsub", "qstat", "qselect", "qdel"):
        path = commands / name
        path.write_text(f'#!/bin/bash\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        path.chmod(0o755)
    return commands


def behave(directory: Path, **behaviour: object) -> None:
    """Let the server behave otherwise from now on; without arguments, as usual."""
    (directory / "behaviour.json").write_text(json.dumps(behaviour))


def behaviour(name: str, usual: object = None) -> object:
    """Return how the server behaves in one respect."""
    path = ROOT / "behaviour.json"
    return (json.loads(path.read_text()) if path.exists() else {}).get(name, usual)


def qsub(argv: list[str]) -> int:
    """Take a job and leave its keeper."""
    if behaviour("qsub") == "lost":
        return refuse(1, "qsub: End of File")
    options, words = parse_options(argv)
    if len(words) != 1:
        return refuse(2, "usage: qsub [options] script; a script takes no arguments")
    script = Path(words[0])
    if not script.is_file():
        return refuse(1, f"qsub: script file '{script}' cannot be loaded")
    directives = read_directives(script)
    if directives is None:
        return refuse(2, "qsub: illegal option in a directive")
    merged = {**directives, **{letter: [*directives.get(letter, []), *values] for letter, values in options.items()}}
    for letter, last in (("q", "workq"), ("o", ""), ("N", script.name), ("J", "")):
        merged.setdefault(letter, [last])
    if merged["q"][-1] not in QUEUES:
        return refuse(170, "qsub: Unknown queue")
    resources = dict(item.split("=", 1) for item in merged.get("l", []) if "=" in item)
    if not re.fullmatch(r"(\d+:)?\d+:\d\d|\d+", resources.get("walltime", "1")):
        return refuse(166, "qsub: Illegal attribute or resource value for Resource_List.walltime")
    depend = next((item.removeprefix("depend=") for item in merged.get("W", []) if item.startswith("depend=")), "")
    with locked():
        number = len(list((ROOT / "jobs").iterdir()))
        job = f"{number}[].pbs1" if merged["J"][-1] else f"{number}.pbs1"
        nodes = int(re.match(r"\d+", resources.get("select", "1"))[0])
        array = int(merged["J"][-1].split("-")[1]) + 1 if merged["J"][-1] else 0
        held = bool(merged["o"][-1]) and not Path(merged["o"][-1]).parent.is_dir()
        (ROOT / "jobs" / job).mkdir()
        save(job, state="H" if held or depend else "Q", depend=depend, script=str(script.absolute()), nodes=nodes,
             array=array, output=merged["o"][-1], cwd=os.getcwd(), held=held, comment="", name=merged["N"][-1])  # fmt: skip
    if not held:
        subprocess.Popen([sys.executable, __file__, "keep", job], start_new_session=True, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    if behaviour("qsub") == "silent":
        return refuse(1, "qsub: End of File")
    sys.stdout.write(f"{job}\n")
    if behaviour("qsub") == "notice":
        sys.stdout.write("Your group has used 93.5 of 100 node hours.\n")
    return 0


def parse_options(argv: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return options by letter and the rest; every option known here takes a value."""
    options: dict[str, list[str]] = {}
    words = list(argv)
    while words and words[0].startswith("-"):
        letter, value = words[0][1:2], words[0][2:]
        if letter not in "NPqlJWjkomv":
            sys.exit(refuse(2, f"qsub: invalid option -- '{letter}'"))
        words = words[1:]
        if not value:
            value, words = words[0], words[1:]
        options.setdefault(letter, []).append(value)
    return options, words


def read_directives(script: Path) -> dict[str, list[str]] | None:
    """Return the #PBS lines before the first command; None when one is not an option with a value."""
    directives: dict[str, list[str]] = {}
    for line in script.read_text().splitlines():
        if line.startswith("#PBS "):
            match = re.fullmatch(r"#PBS -([NPqlJWjkomv]) (\S+)", line)
            if match is None:
                return None
            directives.setdefault(match[1], []).append(match[2])
        elif line and not line.startswith("#"):
            break
    return directives


def keep(job: str) -> None:
    """Wait for the job's parents, run it, note how it ended."""
    fields = load(job)
    verdict = wait_for_parents(fields["depend"])
    if load(job)["state"] == "F":
        return
    if not verdict:  # deleted without a word, and so are those that wait for it
        save(job, state="F", comment="")
        return
    save(job, state="R", comment="Job run at ...")
    indices = range(fields["array"]) if fields["array"] else [None]
    codes = [run(job, fields, index) for index in indices]
    if load(job)["state"] != "F":
        save(job, state="F", exit_status=max(codes))


def wait_for_parents(depend: str) -> bool:
    """Return whether the job may run, once that is decided."""
    for part in filter(None, depend.split(",")):
        kind, *ids = part.split(":")
        for parent in ids:
            while True:
                fields = load(parent)
                if not fields or fields["state"] == "F":
                    break
                time.sleep(0.05)
            code = fields.get("exit_status") if fields else None
            if not fields or (kind == "afterok" and code != 0) or (kind == "afternotok" and code in (0, None)):
                return False
    return True


def run(job: str, fields: dict, index: int | None) -> int:
    """Run the script as one job or subjob; return its exit code."""
    folder = ROOT / "jobs" / job
    nodes = folder / "nodes"
    usual = ["localhost", *(f"node{number}" for number in range(1, fields["nodes"]))]
    hosts = behaviour("nodes", usual)
    nodes.write_text("".join(f"{host}\n" * RANKS_PER_HOST for host in hosts))
    names = ("PATH", "HOME", "LANG", "PBS_STAND_IN")  # a job gets a login's environment, not the submitter's
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"PBS_JOBNAME": fields["name"]}
    environment |= {"PBS_JOBID": job, "PBS_O_WORKDIR": fields["cwd"], "PBS_NODEFILE": str(nodes)}
    environment |= {"OMP_NUM_THREADS": "192", "NCPUS": "192"}
    if index is not None:
        environment |= {
            "PBS_ARRAY_INDEX": str(index),
            "PBS_ARRAY_ID": job,
            "PBS_JOBID": job.replace("[]", f"[{index}]"),
        }
    with open(fields["output"] or os.devnull, "a") as output:
        process = subprocess.Popen(["bash", fields["script"]], cwd=environment.get("HOME", "/"), env=environment, umask=0o077,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)  # fmt: skip
    save(job, pid=process.pid)
    code = process.wait()
    return int(behaviour("exit_status", code if code >= 0 else 256 - code))


def qstat(argv: list[str]) -> int:
    """Print jobs as JSON, as `qstat [-x] -f -F json` does; the exit code is that of the last id that has no answer."""
    with_past = argv[:1] == ["-x"]
    argv = argv[1:] if with_past else argv
    if argv[:3] != ["-f", "-F", "json"]:
        return refuse(2, "the stand-in knows qstat [-x] -f -F json ID... only")
    jobs, code = {}, 0
    history = behaviour("history", True)
    if with_past and not history:
        sys.stdout.write(json.dumps({"timestamp": 1, "pbs_version": "23.06", "pbs_server": "pbs1"}))
        return 0
    for job in argv[3:]:
        fields = load(job)
        has_ended = fields.get("state") == "F"
        if not fields or (has_ended and not history):
            code = refuse(153, f"qstat: Unknown Job Id {job}")
        elif has_ended and not with_past:
            code = refuse(35, f"qstat: {job} Job has finished, use -x or -H to obtain historical job information")
        else:
            jobs[job] = {"Job_Name": fields["name"], "job_state": fields["state"], "comment": fields["comment"]}
            if "exit_status" in fields:
                jobs[job]["Exit_status"] = fields["exit_status"]
    sys.stdout.write(json.dumps({"timestamp": 1, **({"Jobs": jobs} if jobs else {})}))
    return code


def qselect(argv: list[str]) -> int:
    """Print the ids of jobs of a name."""
    with_past = argv[:1] == ["-x"] and behaviour("history", True)
    argv = argv[1:] if argv[:1] == ["-x"] else argv
    if len(argv) != 2 or argv[0] != "-N":
        return refuse(2, "the stand-in knows qselect [-x] -N NAME only")
    for path in sorted((ROOT / "jobs").iterdir(), key=lambda path: int(re.match(r"\d+", path.name)[0])):
        fields = load(path.name)
        if fields.get("name") == argv[1] and (with_past or fields["state"] != "F"):
            sys.stdout.write(f"{path.name}\n")
    return 0


def qdel(argv: list[str]) -> int:
    """End jobs: SIGTERM, then exit status 271."""
    for job in argv:
        fields = load(job)
        if not fields:
            return refuse(153, f"qdel: Unknown Job Id {job}")
        if fields["state"] != "F":
            save(job, state="F", **({"exit_status": 271} if "pid" in fields else {}))
            if "pid" in fields:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(fields["pid"], signal.SIGTERM)
    return 0


def load(job: str) -> dict:
    path = ROOT / "jobs" / job / "job.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(job: str, **fields: object) -> None:
    path = ROOT / "jobs" / job / "job.json"
    temporary = path.with_name(f"{os.getpid()}.partial")
    temporary.write_text(json.dumps({**load(job), **fields}))
    temporary.replace(path)


@contextlib.contextmanager
def locked():
    with (ROOT / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def refuse(code: int, message: str) -> int:
    sys.stderr.write(message + "\n")
    return code


if __name__ == "__main__":
    commands = {"qsub": qsub, "qstat": qstat, "qselect": qselect, "qdel": qdel, "keep": lambda argv: keep(argv[0])}
    if sys.argv[1] != "keep" and behaviour("server") == "down":
        sys.exit(refuse(255, f"Connection refused\n{sys.argv[1]}: cannot connect to server pbs1 (errno=111)"))
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
