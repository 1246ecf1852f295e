"""What a file is known by: a fast hash, older ones that stay valid, and SHA-256 on request."""

import subprocess

import pytest

from megatron_cpt import cli
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.content import ContentDigest, content_hash, has_content
from megatron_cpt.checkpoint.torch_dist.copying import copy_checkpoint
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import file_hash


def flip(path):
    """Change one byte of a file without changing its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_file_is_known_by_xxh3_and_an_older_hash_stays_valid(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    # https://github.com/Cyan4973/xxHash: XXH3_128bits of nothing, seed 0
    assert content_hash(path) == "xxh3:99aa06d3014798d86001c324468d497f"
    path.write_bytes(bytes(range(256)) * 40_000)
    digest = ContentDigest()
    for part in range(0, 10_240_000, 1_000_000):
        digest.update(path.read_bytes()[part : part + 1_000_000])
    new, old = content_hash(path), file_hash(path)
    assert digest.hexdigest() == new and has_content(path, new) and has_content(path, old)
    flip(path)
    assert not has_content(path, new) and not has_content(path, old)


def test_checkpoints_with_older_manifests_verify_copy_and_are_found_damaged(hf_models, tmp_path):
    release = hf_to_mcore(hf_models("llama"), tmp_path / "mcore")
    manifest = mcore.read_manifest(release)
    names = list(manifest["files"])
    assert all(entry["hash"].startswith("xxh3:") for entry in manifest["files"].values())
    manifest.pop("files"), manifest.pop("format")
    mcore.write_manifest(release, manifest, {name: file_hash(release / name) for name in names})
    copy = copy_checkpoint(release, tmp_path / "copies")
    assert mcore.verify_checkpoint(copy)["files"] == mcore.read_manifest(release)["files"]
    flip(next(copy.glob("*.distcp")))
    with pytest.raises(CheckpointError, match="another hash"):
        mcore.verify_checkpoint(copy)


def test_sha256_sums_are_given_on_request_as_sha256sum_reads_them(hf_models, tmp_path, capsys):
    release = hf_to_mcore(hf_models("llama"), tmp_path / "mcore")
    with pytest.raises(SystemExit) as left:
        cli.main(["checkpoint", "verify", str(release), "--sha256"])
    assert left.value.code in (0, None)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("good")]
    assert len(lines) == 1 + len(mcore.read_manifest(release)["files"])
    (tmp_path / "sums").write_text("\n".join(lines) + "\n")
    subprocess.run(["sha256sum", "--check", "--quiet", str(tmp_path / "sums")], check=True)
