"""Disks that are full, read-only, out of inodes, stale, gone or slow: one line with path and cause, exit code 2, nothing lost.

Each verb runs as a person runs it, on a disk that fails at one kind of call (faulty_disk.c). Then the same command runs on a
whole disk: it succeeds, and what it writes is byte for byte what an undisturbed run writes.
"""

import errno
import json
import os
from pathlib import Path

import pytest

from tests.checkpoint.conftest import build_hf_model

WRITE_FAULTS = [
    (operation, number)
    for operation, numbers in (
        ("write", (errno.ENOSPC, errno.EDQUOT, errno.EIO)),
        ("create", (errno.EROFS, errno.EACCES, errno.ENOSPC)),
        ("fsync", (errno.EIO, errno.ENOSPC)),
        ("rename", (errno.EIO, errno.ESTALE)),
        ("mkdir", (errno.ENOSPC, errno.EROFS)),
    )
    for number in numbers
]
READ_FAULTS = [("read", errno.EIO), ("open", errno.EACCES), ("open", errno.ESTALE), ("stat", errno.ESTALE)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, verb):
    """Return a folder with documents, two models and a Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps({"text": f"document {number} " + "word " * (number % 50)}) for number in range(400)]
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n")
    for seed in (0, 1):
        build_hf_model("llama", seed).save_pretrained(folder / f"model{seed}")
    done = verb(["convert", "hf-to-mcore", folder / "model0", folder / "mcore"])
    assert done["code"] == 0, done["err"]
    return folder


def verbs(inputs, output):
    """Return name -> the arguments of a verb that writes to `output`."""
    return {
        "dedup": ["data", "dedup", inputs / "docs.jsonl", "--output", output],
        "sample": ["data", "sample", inputs / "docs.jsonl", "--output", output, "--number", "50"],
        "hf-to-mcore": ["convert", "hf-to-mcore", inputs / "model0", output],
        "mcore-to-hf": ["convert", "mcore-to-hf", inputs / "mcore" / "release", output],
        "soup": ["soup", "--inputs", inputs / "model0", inputs / "model1", "--output", output],
        "copy": ["checkpoint", "copy", inputs / "mcore" / "release", output],
    }  # fmt: skip


NAMES = list(verbs(Path(), Path()))


def content(folder):
    """Return relative path -> bytes of a folder's files, without records that hold times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".json" and path.name != "common.pt"
    }


def told(done):
    """Check that a verb ended as it should on a faulty disk."""
    assert done["code"] == 2 and "Traceback" not in done["err"], done["err"][-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_refuses_to_be_written_is_told_and_the_same_command_then_succeeds(name, inputs, tmp_path, verb):
    whole = tmp_path / "whole"
    assert verb(verbs(inputs, whole)[name])["code"] == 0
    expected = content(whole)
    for operation, number in WRITE_FAULTS:
        output = tmp_path / f"{operation}-{number}"
        done = verb(verbs(inputs, output)[name], f"{operation} {number} /{output.name} 0")
        if done["code"] == 0:  # the verb makes no such call
            assert content(output) == expected
            continue
        told(done)
        assert os.strerror(number) in done["err"] and output.name in done["err"], (operation, done["err"][-800:])
        again = verb(verbs(inputs, output)[name])
        assert again["code"] == 0, again["err"][-2000:]
        assert content(output) == expected
        assert not list(output.parent.glob(f".{output.name}*.partial"))


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_refuses_to_be_read_is_told(name, inputs, tmp_path, verb):
    place = {"dedup": "docs.jsonl", "sample": "docs.jsonl", "mcore-to-hf": "distcp", "copy": "distcp"}.get(
        name, "model0/model"
    )
    for operation, number in READ_FAULTS:
        output = tmp_path / f"{operation}-{number}"
        done = verb(verbs(inputs, output)[name], f"{operation} {number} {place} 0")
        assert "Traceback" not in done["err"], (operation, done["err"][-3000:])
        assert done["code"] in (0, 1, 2)
        if done["code"] == 0:
            assert not (operation == "read" and name != "sample"), (operation, done["out"])


def test_a_slow_disk_is_waited_for(inputs, tmp_path, verb):
    output = tmp_path / "slow"
    done = verb(verbs(inputs, output)["copy"], "delay 20 /slow 0")
    assert done["code"] == 0, done["err"]


@pytest.mark.parametrize("thing", ["file", "folder", "circle", "empty name"])
def test_another_thing_in_the_outputs_place_is_told(thing, inputs, tmp_path, verb):
    for name in NAMES:
        output = tmp_path / f"{name}-{thing}"
        place = output
        place.parent.mkdir(parents=True, exist_ok=True)
        if thing == "file":
            place.write_text("mine")
        elif thing == "folder":
            place.mkdir(exist_ok=True)
            (place / "mine").write_text("mine")
        elif thing == "circle":
            place.symlink_to(place.name)
        done = verb(verbs(inputs, output)[name])
        assert "Traceback" not in done["err"], (name, done["err"][-3000:])
        if thing == "file":
            assert done["code"] != 0 and place.read_text() == "mine", name
        elif thing == "folder":
            assert (place / "mine").read_text() == "mine", name
