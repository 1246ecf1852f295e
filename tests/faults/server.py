"""Runs verbs in forked copies of a process that has imported everything, on a disk that fails, or kills them.

A request is a line of JSON: `argv`, `rules` of faulty_disk.c, `signal` and the seconds `after` which it is sent (0: never). The
answer has `code`, what was said (`out`, `err`), the `seconds` it took and the processes that were `left` in its group.
"""

import ctypes
import json
import os
import sys
import tempfile
import time
import traceback


def main() -> None:
    """Answer requests until the input ends."""
    import torch
    import transformers  # noqa: F401

    import megatron_cpt.checkpoint.convert.hf_mcore
    import megatron_cpt.checkpoint.soup.mean
    import megatron_cpt.data.cleaning.dedup
    import megatron_cpt.data.cleaning.sample  # noqa: F401

    torch.set_num_threads(1)
    library = ctypes.CDLL(sys.argv[1])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line), library)) + "\n")
        sys.stdout.flush()


def answer(request: dict, library: ctypes.CDLL) -> dict:
    """Run one verb and say how it ended."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            run(request, library, out.fileno(), err.fileno())
        if request["signal"]:
            time.sleep(request["after"])
            os.kill(child, request["signal"])
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.monotonic() - started
        time.sleep(0.1 if request["signal"] else 0)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read()[-20_000:])
        return {"code": code, "out": said[0], "err": said[1], "seconds": seconds, "left": group(child)}


def run(request: dict, library: ctypes.CDLL, out: int, err: int) -> None:
    """Be the verb."""
    from megatron_cpt import cli

    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    library.faulty_disk_rules(request["rules"].encode())
    code = 70
    try:
        cli.main(request["argv"])
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    library.faulty_disk_rules(b"")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def group(leader: int) -> list[int]:
    """Return the processes of a group that live."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(name))
    return found


if __name__ == "__main__":
    main()
