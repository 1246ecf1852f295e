"""Kill a conversion, fill its disk, cap its memory: nothing is lost, half-written or silently wrong."""

import functools
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_cpt.checkpoint.convert import hf_mcore as convert_module
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.foreign.convert import foreign_to_mcore
from megatron_cpt.checkpoint.huggingface.folder import HFFolder, OutputGroup, write_safetensors
from megatron_cpt.checkpoint.soup.mean import average_hf
from megatron_cpt.checkpoint.soup.megatron import average_checkpoints
from megatron_cpt.checkpoint.torch_dist import dcp_writer, mcore
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.errors import CheckpointError, CptError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import os, resource, sys
from pathlib import Path
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
"""
TO_MCORE = "hf_to_mcore(Path(sys.argv[1]), Path(sys.argv[2]))\n"
TO_HF = "mcore_to_hf(Path(sys.argv[1]), Path(sys.argv[2]))\n"
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}


def python(code, *arguments, **options):
    """Start Python on `code`; return the process."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def write_model(path, config):
    """Write a Llama of constant bf16 weights as shards, one layer in memory at a time."""
    from megatron_cpt.checkpoint.huggingface.read_config import model_config_from_hf
    from megatron_cpt.checkpoint.mapping.units import family_of, units

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    groups = [
        OutputGroup(
            ((name, shape, torch.bfloat16),),
            lambda shape=shape, number=number: [torch.full(shape, number + 1.0).bfloat16()],
        )
        for number, step in enumerate(units(model_config_from_hf(config), family_of(config["architectures"][0])))
        for name, shape in zip(step.hf, step.hf_shapes, strict=True)
    ]
    write_safetensors(path, groups, max_shard_bytes=200_000_000)
    return sum(group.num_bytes for group in groups)


def forked(function, *arguments):
    """Start `function` in a copy of this process (importing torch again costs seconds); return its id."""
    process_id = os.fork()
    if process_id:
        return process_id
    try:
        torch.set_num_threads(1)  # the copy has none of the parent's threads
        function(*arguments)
        os._exit(0)
    except BaseException as problem:
        os._exit(99 if "File too large" in str(problem) else 98)


def convert_and_stall(convert, source, output, reached, after):
    """Convert, but say so in `reached` and sleep at the write number `after`."""
    original, counter = dcp_writer.HashingWriter.write, itertools.count()

    def write(self, data):
        if next(counter) >= after:
            reached.touch()
            time.sleep(60)
        return original(self, data)

    dcp_writer.HashingWriter.write = write
    convert(source, output)


def test_a_killed_soup_leaves_nothing_under_the_name_and_the_next_one_clears_up(hf_models, tmp_path):
    output, reached = tmp_path / "soup", tmp_path / "reached"
    models = [hf_models("llama"), hf_models("llama")]
    process_id = forked(convert_and_stall, average_hf, models, output, reached, 5)
    deadline = time.monotonic() + 60
    while not reached.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)
    assert not output.exists() and list(tmp_path.glob(".soup.*.partial"))
    assert average_hf(models, output) == output
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("convert", "after"),
    [(hf_to_mcore, 0), (hf_to_mcore, 150), (hf_to_mcore, "last"), (mcore_to_hf, 1), (mcore_to_hf, 12)],
)
def test_a_killed_conversion_leaves_nothing_under_the_name_and_the_next_one_starts_clean(
    convert, after, hf_models, tmp_path, monkeypatch
):
    source = hf_models("llama") if convert is hf_to_mcore else hf_to_mcore(hf_models("llama"), tmp_path / "source")
    if after == "last":
        after = count_writes(source, tmp_path, monkeypatch) - 1
    output, reached = tmp_path / "output", tmp_path / "reached"
    process_id = forked(convert_and_stall, convert, source, output, reached, after)
    deadline = time.monotonic() + 60
    while not reached.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)
    assert reached.exists()
    name = output / "release" if convert is hf_to_mcore else output
    assert not name.exists() and list(name.parent.glob(f".{name.name}.*.partial"))
    assert mcore.newest_good_checkpoint(output) is None
    assert convert(source, output, verify=True) == name
    assert not list(name.parent.glob(".*.partial"))


def count_writes(source, tmp_path, monkeypatch):
    """Return how many writes a conversion of `source` takes."""
    counter = itertools.count()
    original = dcp_writer.HashingWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(dcp_writer.HashingWriter, "write", lambda self, data: (next(counter), original(self, data))[1])
        hf_to_mcore(source, tmp_path / "counted")
    return next(counter)


def test_a_second_conversion_to_the_same_name_does_not_disturb_the_first(hf_models, tmp_path):
    source, output, reached = hf_models("llama"), tmp_path / "output", tmp_path / "reached"
    process_id = forked(convert_and_stall, hf_to_mcore, source, output, reached, 20)
    deadline = time.monotonic() + 60
    while not reached.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(CheckpointError, match="another process converts to it"):
        hf_to_mcore(source, output)
    assert list(output.glob(".release.*.partial"))
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)
    hf_to_mcore(source, output)


@pytest.mark.parametrize("convert", [hf_to_mcore, mcore_to_hf])
def test_a_full_disk_fails_the_conversion_and_leaves_nothing(convert, hf_models, tmp_path):
    source = hf_models("llama") if convert is hf_to_mcore else hf_to_mcore(hf_models("llama"), tmp_path / "source")
    output = tmp_path / "output"

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        convert(source, output)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(limited), 0)[1]) == 99
    name = output / "release" if convert is hf_to_mcore else output
    assert not name.exists() and not list(name.parent.glob(".*.partial"))
    assert mcore.read_tracker(output) is None


STEPS = {
    "index": (dcp_writer, "sync_dir"),
    "manifest": (mcore, "write_manifest"),
    "tracker": (mcore, "write_tracker"),
    "configs": (convert_module, "write_configs"),
    "record": (convert_module, "write_json"),
}


@pytest.mark.parametrize("step", ["index", "manifest", "tracker", "foreign-manifest", "configs", "record"])
def test_a_conversion_killed_between_its_steps_starts_clean_or_is_whole(step, hf_models, tmp_path):
    source = hf_models("llama")
    convert, name = hf_to_mcore, tmp_path / "output" / "release"
    if step == "foreign-manifest":
        source, step = hf_to_mcore(source, tmp_path / "source"), "manifest"
        model = mcore.manifest_model(mcore.read_manifest(source), source)
        convert = functools.partial(foreign_to_mcore, model=model)
    elif step in ("configs", "record"):
        source = hf_to_mcore(source, tmp_path / "source")
        convert, name = mcore_to_hf, tmp_path / "output"
    module, function = STEPS[step]

    def killed():
        setattr(module, function, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
        convert(source, tmp_path / "output")

    assert os.waitstatus_to_exitcode(os.waitpid(forked(killed), 0)[1]) == -signal.SIGKILL
    assert name.exists() == (step == "tracker")
    assert convert(source, tmp_path / "output") == name
    if convert is not mcore_to_hf:
        mcore.verify_checkpoint(name)
        assert mcore.read_tracker(tmp_path / "output") == "release"
    assert not list(name.parent.glob(".*.partial"))


def test_a_flipped_bit_in_a_checkpoint_is_not_exported_averaged_or_converted(hf_models, tmp_path):
    release = hf_to_mcore(hf_models("llama"), tmp_path / "mcore")
    model = mcore.manifest_model(mcore.read_manifest(release), release)
    info = DcpReader(release).metadata.storage_data[MetadataIndex("decoder.layers.1.mlp.linear_fc2.weight", (0, 0))]
    part = release / info.relative_path
    content = bytearray(part.read_bytes())
    content[info.offset + info.length // 2] ^= 16
    part.write_bytes(content)
    mcore.verify_checkpoint(release, "size")
    for write in (
        lambda: mcore_to_hf(release, tmp_path / "hf"),
        lambda: average_checkpoints([release, release], tmp_path / "soup"),
        lambda: foreign_to_mcore(release, tmp_path / "again", model),
    ):
        with pytest.raises(CptError, match="linear_fc2.weight at byte .*CRC-32 does not fit"):
            write()
    assert not (tmp_path / "hf").exists() and not (tmp_path / "soup" / "release").exists()


def test_too_little_space_is_said_before_anything_is_written(hf_models, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(mcore.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="1000 B free"):
        hf_to_mcore(hf_models("llama"), tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_memory_stays_below_a_cap_that_is_smaller_than_the_model(tmp_path):
    """A model of 585 MB converts both ways under a limit of 250 MB of data above what the imports take."""
    source = tmp_path / "large"
    size = write_model(source, LARGE)
    cap = 250_000_000
    assert size > 2 * cap
    limit = (
        "used = int(open('/proc/self/status').read().split('VmData:')[1].split()[0]) * 1024\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, (used + {cap}, used + {cap}))\n"
    )
    for code, first, second in ((TO_MCORE, source, tmp_path / "mcore"), (TO_HF, tmp_path / "mcore", tmp_path / "hf")):
        process = python(limit + code, first, second)
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error
    before, after = HFFolder(source), HFFolder(tmp_path / "hf")
    for name in ("model.embed_tokens.weight", "model.layers.23.mlp.down_proj.weight"):
        assert torch.equal(before.read(name), after.read(name))
    process = python(limit + "HFFolder(Path(sys.argv[1]))\nimport torch; torch.ones(70_000_000)\n", source)
    assert process.wait(timeout=120) != 0  # the cap works
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
