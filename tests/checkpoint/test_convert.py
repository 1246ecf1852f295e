"""Hugging Face -> Megatron -> Hugging Face, bit for bit, whole or not at all."""

import json

import torch

from megatron_cpt.checkpoint import mcore
from megatron_cpt.checkpoint.convert import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.hf import HFFolder


def assert_same_tensors(left, right):
    """Compare two Hugging Face folders bit by bit."""
    first, second = HFFolder(left), HFFolder(right)
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        assert first.dtype(name) == second.dtype(name)
        assert torch.equal(first.read(name), second.read(name)), name


def test_round_trip_is_bit_exact(architecture, hf_models, tmp_path):
    source = hf_models(architecture)
    release = hf_to_mcore(source, tmp_path / "mcore", verify=True)
    assert mcore.read_tracker(tmp_path / "mcore") == "release"
    mcore.verify_checkpoint(release, "full")
    exported = mcore_to_hf(release, tmp_path / "hf", verify=True)
    assert_same_tensors(source, exported)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, exported))
    assert before.items() <= after.items()
    hashes = [json.loads((path / "conversion.json").read_text())["tensors"] for path in (release, exported)]
    assert hashes[0] == hashes[1] and set(hashes[0]) == set(HFFolder(source).names())
