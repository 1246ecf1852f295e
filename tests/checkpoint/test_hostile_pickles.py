"""No pickle that somebody hands us runs code, hangs or eats the memory, whichever file of a checkpoint it is."""

import io
import json
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_cpt import cli
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore
from megatron_cpt.checkpoint.foreign.deepspeed import DeepSpeedUniversalWeights, universal_step
from megatron_cpt.checkpoint.foreign.opening import open_foreign
from megatron_cpt.checkpoint.foreign.torch_format import TorchFormat
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.mapping.kinds import Copy
from megatron_cpt.checkpoint.mapping.units import Unit
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader, read_metadata
from megatron_cpt.checkpoint.torch_dist.dcp_writer import Slice, write_dcp
from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest, write_manifest
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import COMMON_STATE, check_safe, read_common
from megatron_cpt.checkpoint.torch_dist.pickles import load_safely
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError
from tests.hostile import attacks, misusing, running

RUNNING, MISUSING = list(running(Path())), list(misusing())
ALL = [*RUNNING, *MISUSING]
CAP = 4 << 30
MODEL = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=8)
UNIT = Unit(Copy("a", ("a",), lambda model: (2,)), (2,), ((2,),))


@pytest.fixture
def mark(tmp_path):
    """Return the file that an attack makes when it succeeds."""
    return tmp_path / "mark"


@pytest.fixture(autouse=True)
def little_memory():
    """Give this process 4 GiB of address space more than it has: what asks for more fails instead of eating the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + CAP, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def archive(content, path):
    """Write a `torch.save` archive whose pickle is `content`."""
    torch.save({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as source:
        parts = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, value in parts.items():
            target.writestr(name, content if name.endswith("data.pkl") else value)


def legacy(content, path):
    """Write a file as torch did before 1.6 whose object is `content`."""
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(pickle_head(path.read_bytes()) + content)


def pickle_head(content):
    """Return the magic number, the protocol and the system that stand before the object."""
    file = io.BytesIO(content)
    for _ in range(3):
        pickle.load(file)
    return content[: file.tell()]


@pytest.mark.parametrize("name", RUNNING)
def test_the_attacks_are_attacks(name, mark):
    if name.startswith(
        "dotted"
    ):  # its modules take seconds to import; tests/train/test_hostile_checkpoint.py proves it
        return
    code = "import sys, pickle; pickle.load(sys.stdin.buffer)"
    subprocess.run([sys.executable, "-c", code], input=running(mark)[name], capture_output=True, check=False)
    assert mark.exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ALL)
def test_an_index_is_read_as_data(name, mark, tmp_path):
    version = Metadata.__dict__["version"]
    (tmp_path / ".metadata").write_bytes(attacks(mark)[name])
    with pytest.raises(CheckpointError, match=r"\.metadata: (names|cannot be read)"):
        read_metadata(tmp_path)
    assert not mark.exists() and Metadata.__dict__["version"] is version


@pytest.mark.timeout(20)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["key", "value", "planner_data", "storage_meta"])
def test_a_good_index_with_an_attack_inside_is_refused(place, protocol, mark, tmp_path):
    write_dcp(tmp_path, [Slice("a", (2,), torch.float32, (0,), (2,), lambda: torch.zeros(2))])
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    evil = Evil(f"touch {mark}")
    if place == "key":
        index.state_dict_metadata[evil] = index.state_dict_metadata["a"]
    elif place == "value":
        index.state_dict_metadata["b"] = evil
    else:
        setattr(index, place, evil)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index, protocol))
    with pytest.raises(CheckpointError, match=r"\.metadata: (names|cannot be read)"):
        read_metadata(tmp_path)
    assert not mark.exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_index_of_any_protocol_that_keeps_classes_is_read(protocol, tmp_path):
    write_dcp(tmp_path, [Slice("a", (2,), torch.bfloat16, (0,), (2,), lambda: torch.ones(2).bfloat16())])
    path = tmp_path / ".metadata"
    before = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(before, protocol))
    assert read_metadata(tmp_path) == before
    assert torch.equal(DcpReader(tmp_path).read("a"), torch.ones(2).bfloat16())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: setattr(info, "relative_path", "../other/__0_0.distcp"), "not a file of the folder"),
        (lambda info: setattr(info, "relative_path", "/etc/passwd"), "not a file of the folder"),
        (lambda info: setattr(info, "relative_path", ".."), "not a file of the folder"),
        (lambda info: setattr(info, "relative_path", ""), "not a file of the folder"),
        (lambda info: setattr(info, "transform_descriptors", ["zstd"]), "transformed"),
        (lambda info: setattr(info, "length", -1), "negative length"),
        (lambda info: setattr(info, "offset", -5), "no number"),
        (lambda info: setattr(info, "offset", 1 << 80), "no number"),
        (lambda info: setattr(info, "offset", "0"), "no number"),
    ],
)
def test_a_place_outside_of_the_folder_is_refused(change, said, tmp_path):
    write_dcp(tmp_path, [Slice("a", (2,), torch.float32, (0,), (2,), lambda: torch.zeros(2))])
    path = tmp_path / ".metadata"
    index = pickle.loads(path.read_bytes())
    for info in index.storage_data.values():
        change(info)
    path.write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        DcpReader(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("write", [archive, legacy, lambda content, path: path.write_bytes(content)])
@pytest.mark.parametrize("name", RUNNING)
def test_no_reader_of_torch_save_files_runs_code(write, name, mark, tmp_path):
    content = attacks(mark)[name]
    (tmp_path / "config.json").write_text("{}")
    files = {
        "common.pt": lambda: read_common(tmp_path),
        "pytorch_model.bin": lambda: HFFolder(tmp_path),
        "mp_rank_00/model_optim_rng.pt": lambda: TorchFormat(tmp_path),
        "zero/a/fp32.pt": lambda: DeepSpeedUniversalWeights(tmp_path, MODEL).read(UNIT),
        "zero/a/step.pt": lambda: universal_step(tmp_path),
        "zero/optimizer_state.pt": lambda: universal_step(tmp_path),
        "any.pth": lambda: load_safely(tmp_path / "any.pth", "any.pth", mmap=True),
    }
    for file, read in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write(content, path)
        with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
            read()
        path.unlink()
        assert not mark.exists(), file


@pytest.mark.parametrize("name", RUNNING)
def test_a_distributed_optimizers_file_runs_no_code(name, mark, tmp_path):
    folder = tmp_path / "mp_rank_00"
    folder.mkdir()
    torch.save({"model": {}, "optimizer": {"optimizer": {}}, "checkpoint_version": 3.0}, folder / "model_optim_rng.pt")
    archive(attacks(mark)[name], folder / "distrib_optim.pt")
    with pytest.raises(CheckpointError, match="distrib_optim"):
        open_foreign(tmp_path, MODEL)
    assert not mark.exists()


@pytest.mark.parametrize("name", RUNNING)
def test_slices_and_objects_of_a_torch_dist_folder_run_no_code(name, mark, tmp_path):
    write_dcp(
        tmp_path, [Slice("a", (2,), torch.float32, (0,), (2,), lambda: torch.zeros(2))], objects={COMMON_STATE: [1]}
    )
    archive(attacks(mark)[name], tmp_path / "__0_0.distcp")
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.offset, info.length = 0, (tmp_path / "__0_0.distcp").stat().st_size
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    for read in (lambda: DcpReader(tmp_path).read("a"), lambda: read_common(tmp_path), lambda: check_safe(tmp_path)):
        with pytest.raises(CheckpointError, match="distcp"):
            read()
    assert not mark.exists()


def test_verify_does_not_call_a_checkpoint_good_that_could_run_code(hf_models, mark, tmp_path, capsys):
    release = hf_to_mcore(hf_models("llama"), tmp_path / "mcore")
    manifest = {k: v for k, v in read_manifest(release).items() if k not in ("files", "format")}
    for name, content in running(mark).items():
        (release / ".metadata").write_bytes(content)
        write_manifest(release, manifest)
        with pytest.raises(SystemExit) as ended:
            cli.main(["checkpoint", "verify", str(release)])
        output = capsys.readouterr().out
        assert ended.value.code == 1 and output.startswith("DAMAGED") and "\ngood" not in output, name
    assert not mark.exists()


def test_values_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for content in ([1], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(1)):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
            HFFolder(tmp_path)


def test_a_file_from_before_torch_1_6_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    torch.save({"a": torch.arange(3.0)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(HFFolder(tmp_path).read("a"), torch.arange(3.0))


def test_an_index_that_says_more_than_the_memory_is_refused(tmp_path):
    write_dcp(tmp_path, [Slice("a", (2,), torch.float32, (0,), (1 << 50,), lambda: torch.zeros(2))])
    with pytest.raises(CheckpointError, match="more than the memory"):
        DcpReader(tmp_path).read("a")


def test_a_slice_of_another_shape_than_the_index_says_is_refused(tmp_path):
    write_dcp(tmp_path, [Slice("a", (2,), torch.float32, (0,), (2,), lambda: torch.zeros(2))])
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    entry = index.state_dict_metadata["a"]
    entry.size = torch.Size((3,))
    object.__setattr__(entry.chunks[0], "sizes", torch.Size((3,)))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="is not the .3. torch.float32"):
        DcpReader(tmp_path).read("a")
