"""Every file of a checkpoint and of a run, emptied, cut, flipped or replaced: an error of ours in one line, never code, never a hang."""

import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_cpt import cli
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.torch_dist import mcore
from tests.checkpoint.conftest import build_hf_model
from tests.hostile import attacks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a Hugging Face model `hf` and its checkpoint `mcore/release`."""
    folder = tmp_path_factory.mktemp("made")
    build_hf_model("llama").save_pretrained(folder / "hf")
    hf_to_mcore(folder / "hf", folder / "mcore")
    return folder


def _flip(path):
    content = bytearray(path.read_bytes())
    for _ in range(3):
        place = random.Random(path.name).randrange(len(content))
        content[place] ^= 1 << random.Random(place).randrange(8)
    path.write_bytes(content)


def _circle(path):
    path.unlink()
    path.symlink_to(path.name)


def _folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": _flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(random.Random(7).randbytes(path.stat().st_size)),
    "null": lambda path: path.write_text("null"),
    "list": lambda path: path.write_text("[1]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "folder": _folder,
    "circle": _circle,
    "gone": lambda path: path.unlink(),
}


def damaged_copies(source: Path, folder: Path):
    """Yield (file, damage, copy of `source` with that damage)."""
    for file in sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file()):
        for name, damage in DAMAGES.items():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            damage(folder / file)
            yield file, name, folder


def ended(argv, capsys):
    """Run a verb in this process; return its exit code and what it said."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in argv])
    said = capsys.readouterr()
    return left.value.code, said.out + said.err


@pytest.mark.timeout(900)
def test_every_file_of_a_checkpoint(made, tmp_path, capsys):
    tried = 0
    for file, damage, copy in damaged_copies(made / "mcore", tmp_path / "copy"):
        tried += 1
        code, said = ended(["checkpoint", "verify", copy], capsys)
        if file.name == mcore.TRACKER:
            assert code in (0, 1), (damage, said)
            continue
        assert code == 1 or "no complete checkpoint" in said, (file, damage, said)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, said = ended(["convert", "mcore-to-hf", copy / "release", tmp_path / "out"], capsys)
        assert code in (0, 2) and (code == 2 or file.name in ("metadata.json", "common.pt")), (file, damage, said)
    assert tried >= 55


@pytest.mark.timeout(900)
def test_every_file_of_a_hugging_face_folder(made, tmp_path, capsys):
    for file, damage, copy in damaged_copies(made / "hf", tmp_path / "copy"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, said = ended(["convert", "hf-to-mcore", copy, tmp_path / "out"], capsys)
        assert code in (0, 2), (file, damage, said)
        if code == 0:  # a side file, or a flipped bit in the weights, which have no checksum: they are then the weights
            assert file.name == "generation_config.json" or damage in ("flipped", "zeros", "noise"), (file, damage)


def test_a_planted_pickle_in_any_file_of_a_checkpoint_runs_nothing(made, tmp_path, capsys):
    mark = tmp_path / "mark"
    for name, content in attacks(mark).items():
        for file in (".metadata", "common.pt", "__0_0.distcp"):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(made / "mcore", copy)
            (copy / "release" / file).write_bytes(content)
            manifest = {
                k: v for k, v in mcore.read_manifest(made / "mcore" / "release").items() if k not in ("files", "format")
            }
            mcore.write_manifest(copy / "release", manifest)
            code, said = ended(["checkpoint", "verify", copy], capsys)
            assert code == 1 or file == "__0_0.distcp", (name, file, said)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            if file != "common.pt":
                with pytest.raises(Exception, match="distcp|metadata"):
                    mcore_to_hf(copy / "release", tmp_path / "out")
            assert not mark.exists() and not os.path.exists(mark)
