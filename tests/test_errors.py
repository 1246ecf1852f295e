"""What the operating system refuses is one line with path and cause, exit code 2, whichever verb meets it."""

import errno
import os
from pathlib import Path

import pytest

from megatron_cpt import cli
from megatron_cpt.errors import CptError, storage_error
from megatron_cpt.files import naming, read_json, write_text
from megatron_cpt.verbs import status

CODES = (
    "EIO ESTALE EACCES ENOSPC EDQUOT EROFS EISDIR ENOTDIR ELOOP EMFILE ENOMEM ENAMETOOLONG ETIMEDOUT ENOTCONN".split()
)


@pytest.mark.parametrize("code", CODES)
def test_a_refusal_names_path_and_cause_in_one_line(code):
    number = getattr(errno, code)
    text = str(storage_error(OSError(number, os.strerror(number), "/data/file")))
    assert text.startswith(f"/data/file: {os.strerror(number)} ({code}). ") and "\n" not in text and text.endswith(".")


def test_a_refusal_without_number_or_name_is_told_too():
    assert "4 requested and 2 written" in str(storage_error(OSError("4 requested and 2 written")))
    with pytest.raises(OSError) as raised:
        with naming(Path("/data/file")):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert str(storage_error(raised.value)).startswith("/data/file: No space left on device (ENOSPC). Room")


@pytest.mark.parametrize("code", CODES)
def test_the_command_line_says_it_in_one_line_and_exits_2(code, monkeypatch, capsys):
    number = getattr(errno, code)

    def refuse(arguments):
        raise OSError(number, os.strerror(number), "/data/file")

    monkeypatch.setattr(status, "run", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("megatron-cpt status: /data/file: ") and said.count("\n") == 1


def test_a_folder_in_a_files_place_and_a_circle_of_links_are_one_line(tmp_path, capsys):
    (tmp_path / "config.json").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    for argv in (
        ["convert", "hf-to-mcore", str(tmp_path), str(tmp_path / "out")],
        ["data", "validate", "--input", str(tmp_path / "circle")],
        ["checkpoint", "inspect", str(tmp_path / "circle")],
        ["analyze", "stats", str(tmp_path)],
        ["report", str(tmp_path / "circle"), "--output", str(tmp_path / "r")],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("megatron-cpt ") and "usage:" not in said, (argv, said)
        assert said.splitlines()[-1].startswith("megatron-cpt "), said


@pytest.mark.parametrize(
    "content", ["null", "[1]", "[" * 100_000, "{" * 100_000, '{"a": ' * 50_000, "1" * 10_000, "\ufeff{}"]
)
def test_odd_json_is_an_error_of_ours(content, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(content)
    try:
        read_json(path)
    except CptError as problem:
        assert str(problem).startswith(f"{path}: not valid JSON")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "before")

    def fails(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError) as raised:
        write_text(path, "after")
    assert raised.value.filename == str(path) and path.read_text() == "before"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
