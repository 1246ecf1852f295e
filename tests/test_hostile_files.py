"""Small files that somebody made to hurt: each parser answers with an error of ours, soon, and with little memory."""

import bz2
import contextlib
import gzip
import json
import lzma
import math
import os
import struct
import subprocess
import sys
import time

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt import cli
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.dcp import read_metadata
from megatron_cpt.checkpoint.torch_dist.pickles import load_safely
from megatron_cpt.config.loading.sources import parse_inline, read_yaml
from megatron_cpt.data.blend.replay import read_buffer
from megatron_cpt.data.lists import formats
from megatron_cpt.data.reading.plain_reader import PlainReader
from megatron_cpt.data.shards.indexed import read_index
from megatron_cpt.errors import ConfigError, CptError, LaunchError
from megatron_cpt.files import read_json_object
from megatron_cpt.launch.scheduler.site import read_site
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import ledger_path, read_jobs
from megatron_cpt.run.progress import read_progress
from tests.tiers import full_except

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join(['*' + chr(97 + level)] * 10)}]\n" for level in range(9)
)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{" * 100_000, "a: " + "[" * 100_000 + "]" * 100_000, "- " * 100_000 + "x", "? " * 100_000 + "x",
     "".join(" " * level + "a:\n" for level in range(2000)), "a: {b: " * 50_000, BOMB, "a: &a [*a]", "a: 2026-13-45",
     "a: " + "9" * 5000, "a: !!python/object:os.system x", "a: !!binary x", "a: 0x" + "f" * 5000, "a: \0", "? [a]\n: b",
     "a: !!int x", "a: !!float y", "a: !!timestamp z", "<<: 3", "a: {<<: [1]}", "\t- a", "a: .inf\nb: !!set {x"]
)  # fmt: skip
def test_odd_yaml_is_an_error_or_a_mapping(text, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    for read in (
        read_yaml,
        lambda path: read_buffer(path),
        lambda path: formats.read_yaml(path.read_text(), "list", ""),
    ):
        try:
            read(path)
        except CptError as problem:
            assert len(str(problem)) < 2000
    try:
        parse_inline(text)
    except ValueError as problem:
        assert len(str(problem)) < 2000


def test_yaml_that_nests_and_repeats_within_reason_is_read(tmp_path):
    path = tmp_path / "task.yaml"
    deep: object = "x"
    for _ in range(60):
        deep = {"a": [deep]} if _ % 2 else {"a": deep}
    path.write_text(yaml.safe_dump({"base": deep}) + "one: &one {a: 1}\ntwo: {<<: *one, b: [*one, *one]}\n")
    assert read_yaml(path)["two"] == {"a": 1, "b": [{"a": 1}, {"a": 1}]}
    rows = "".join(f"- {{tokens: 1, prefix: p{number}}}\n" for number in range(20_000))
    started = time.monotonic()
    assert len(formats.read_yaml(rows, "list", "")) == 20_000 and time.monotonic() - started < 60


@FUZZ
@given(st.text(alphabet="[]{}:,-?&*!|>'\"#%@` \n\tab01<~.", max_size=300))
def test_any_yaml_is_an_error_or_a_mapping(tmp_path, text):
    (tmp_path / "fuzz.yaml").write_text(text)
    with contextlib.suppress(ConfigError):
        assert isinstance(read_yaml(tmp_path / "fuzz.yaml"), dict)


def header(entries: object, content: bytes = b"\0" * 16) -> bytes:
    """Return a safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + content


def tensor(**changes: object) -> dict[str, object]:
    """Return the entry of a tensor of four floats, changed."""
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, struct.pack("<Q", 1 << 63), header(b"null"), header(b"[]"), header(b"7"), header(b"{"), header(b"\xff"),
     header(b"[" * 100_000), header(b'{"a": null}'), header({"a": []}), header({"a": {}}), header(tensor(dtype=None)),
     header(tensor(dtype=["F32"])), header(tensor(dtype="F31")), header(tensor(shape="4")), header(tensor(shape=[-4])),
     header(tensor(shape=[-2, -2])), header(tensor(shape=[4.0])), header(tensor(shape=[True, 4])), header(tensor(shape={"4": 4})),
     header(tensor(data_offsets=[16, 0])), header(tensor(data_offsets=[-16, 0])), header(tensor(data_offsets=[0])),
     header(tensor(data_offsets=[0, 16, 32])), header(tensor(data_offsets=[0, 1 << 70])), header(tensor(data_offsets=[8, 24])),
     header(tensor(data_offsets=None)), header(tensor(shape=[1 << 62, 4])), header(tensor(data_offsets=[0.0, 16.0])),
     header({**tensor(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}),
     header(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}')],
)  # fmt: skip
def test_an_odd_safetensors_header_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CptError, match=r"model\.safetensors"):
        HFFolder(tmp_path)


def test_a_good_header_is_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    entries = {
        **tensor(),
        "empty": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]},
        "__metadata__": {"format": "pt"},
    }
    (tmp_path / "model.safetensors").write_bytes(header(entries))
    folder = HFFolder(tmp_path)
    assert torch.equal(folder.read("a"), torch.zeros(4)) and folder.read("empty").numel() == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "files"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@FUZZ
@given(JSON, st.binary(max_size=40))
def test_any_json_in_any_small_file_is_an_error_or_read(tmp_path, value, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(header({"a": value}, content))
    folder = tmp_path / "iter_0000001"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(value))
    (tmp_path / "some.json").write_text(json.dumps(value))
    readers = (
        lambda: HFFolder(tmp_path).read("a"),
        lambda: mcore.read_manifest(folder),
        lambda: read_json_object(tmp_path / "some.json"),
        lambda: formats.read_json(json.dumps(value), "list", "train"),
    )
    for read in readers:
        with contextlib.suppress(CptError):
            read()


@FUZZ
@given(st.binary(max_size=200), st.sampled_from([b"", b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)]))
def test_any_bytes_in_any_binary_file_are_an_error_or_read(tmp_path, content, start):
    for name in (".metadata", "a.pt", "s.idx", "s.bin", mcore.TRACKER):
        (tmp_path / name).write_bytes(start + content)
    readers = (
        lambda: read_metadata(tmp_path),
        lambda: load_safely(tmp_path / "a.pt", "a.pt", mmap=True),
        lambda: read_index(tmp_path / "s"),
        lambda: mcore.read_tracker(tmp_path),
    )
    for read in readers:
        with contextlib.suppress(CptError):
            read()


@FUZZ
@given(st.lists(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_any_ledger_and_any_metrics_are_read_line_by_line(tmp_path, lines):
    run = RunDir(tmp_path)
    run.jobs.mkdir(exist_ok=True)
    good = b'{"job": "7", "time": 1.0, "state": "finished"}'
    ledger_path(run.jobs).write_bytes(b"\n".join([*lines, good]) + b"\n")
    assert read_jobs(run.jobs)["7"]["state"] == "finished"
    step = b'{"kind": "train", "iteration": 5, "consumed_tokens": 9, "loss": 1.5, "time": 2.0}'
    run.metrics_path.write_bytes(b"\n".join([*lines, step]) + b"\n")
    assert read_progress(run).iteration == 5


def test_a_bad_byte_in_one_ledger_does_not_hide_the_other_runs(tmp_path, capsys):
    for name in ("a", "b"):
        jobs = tmp_path / name / "jobs"
        jobs.mkdir(parents=True)
        ledger_path(jobs).write_bytes(b'{"job": "by-hand", "time": 1.0, "state": "finished", "submitted": "x"}\n')
    with ledger_path(tmp_path / "a" / "jobs").open("ab") as file:
        file.write(b'\xff{"job": 3}\n[]\nnull\n{"job": ["a"]}\n')
    (tmp_path / "c" / "jobs" / "ledger.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", "--runs", str(tmp_path)])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.count("by-hand") == 2 and "its state cannot be told" in shown


@pytest.mark.parametrize("name", ["A;touch x", "A B", "1A", "A=1", "$(x)", "A\nB", "", "Ä", "-n"])
def test_a_sites_variable_must_have_a_name(name, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(json.dumps({"site": {"scheduler": "slurm", "environment": {name: "1"}}}))
    with pytest.raises((ConfigError, LaunchError), match="is not the name of a variable"):
        read_site(path)


MANY = b"x" * (1 << 20)
BOMBS = {
    "gz": lambda size: b"".join(_stream(gzip_member(), size)),
    "bz2": lambda size: b"".join(_stream(bz2.BZ2Compressor(), size)),
    "xz": lambda size: b"".join(_stream(lzma.LZMACompressor(), size)),
    "zst": lambda size: zstd(size),
}


def gzip_member():
    """Return a compressor of one gzip member."""
    import zlib

    return zlib.compressobj(9, wbits=31)


def zstd(size: int) -> bytes:
    """Return `size` equal bytes in one zstandard frame."""
    import zstandard

    return b"".join(_stream(zstandard.ZstdCompressor(level=19).compressobj(size=size), size))


def _stream(compressor, size):
    for _ in range(size // len(MANY)):
        yield compressor.compress(MANY)
    yield compressor.flush()


@pytest.mark.slow
@pytest.mark.parametrize("kind", full_except(BOMBS, "gz"))
def test_a_line_of_600_mb_in_a_small_file_takes_bounded_memory(kind, tmp_path):
    path = tmp_path / f"bomb.jsonl.{kind}"
    path.write_bytes(BOMBS[kind](600 << 20))
    assert path.stat().st_size < 1 << 20
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom megatron_cpt.data.reading.documents import list_sources\n"
        "from megatron_cpt.data.reading.streams import stream_blocks\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "(source,) = list_sources([Path(sys.argv[1])])\n"
        "found = [problem.kind for _, _, problem in stream_blocks(source, 8 << 20, 64 << 20) if problem]\n"
        "print(found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    found, megabytes = done.stdout.rsplit(" ", 1)
    assert "too" in found and int(megabytes) < 400, done.stdout


@pytest.mark.parametrize("kind", BOMBS)
def test_what_comes_out_of_a_compressed_file_is_what_went_in(kind, tmp_path):
    content = os.urandom(3_000_000) + b"line\n" * 5_000_000 + os.urandom(1000)
    path = tmp_path / f"file.{kind}"
    import zstandard

    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}[kind]
    path.write_bytes(compress(content[:10_000_000]) + compress(content[10_000_000:]))
    with PlainReader(path, kind) as reader:
        found = b"".join(iter(lambda: reader.read(1 << 20), b""))
    assert found == content
    path.write_bytes(path.read_bytes()[:-20])
    with PlainReader(path, kind) as reader:
        blocks, damage = reader.read_block(math.inf)  # type: ignore[arg-type]
    assert damage and content.startswith(blocks)
