"""torch.distributed.checkpoint files, written and read piece by piece, safely."""

import pickle

import pytest
import torch
from torch.distributed import checkpoint as torch_dcp

from megatron_cpt.checkpoint.torch_dist.content import content_hash
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.checkpoint.torch_dist.dcp_writer import Slice, write_dcp
from megatron_cpt.errors import CheckpointError


def whole(key, tensor):
    """Return the slice that is all of `tensor`."""
    shape = tuple(tensor.shape)
    return Slice(key, shape, tensor.dtype, (0,) * len(shape), shape, lambda: tensor)


def test_torch_reads_what_is_written(tmp_path):
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(7, dtype=torch.bfloat16), "c": torch.tensor(2.5)}
    write_dcp(tmp_path, [whole(key, tensor) for key, tensor in tensors.items()])
    loaded = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    torch_dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_what_torch_writes_is_read(tmp_path):
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(7)}
    torch_dcp.save({**tensors, "note": "text"}, checkpoint_id=tmp_path, no_dist=True)
    reader = DcpReader(tmp_path)
    assert sorted(reader.tensor_keys()) == ["a", "b"] and reader.object_keys() == ["note"]
    assert all(torch.equal(reader.read(key), tensors[key]) for key in tensors)
    assert reader.read_object("note") == "text"


def test_any_region_is_put_together_from_the_slices_that_overlap_it(tmp_path):
    tensor = torch.randn(8, 6)
    slices = [
        Slice("a", (3 if top else 5, 3), tensor.dtype, (0 if not top else 5, left), (8, 6), piece)
        for top in (0, 1)
        for left in (0, 3)
        for piece in [lambda top=top, left=left: tensor[5:, left : left + 3] if top else tensor[:5, left : left + 3]]
    ]
    write_dcp(tmp_path, slices)
    reader = DcpReader(tmp_path)
    assert torch.equal(reader.read("a"), tensor)
    for start, shape in (((0, 0), (8, 6)), ((4, 2), (3, 3)), ((1, 1), (2, 2)), ((5, 3), (3, 3)), ((7, 5), (1, 1))):
        rows, columns = (slice(low, low + size) for low, size in zip(start, shape, strict=True))
        assert torch.equal(reader.read("a", start, shape), tensor[rows, columns])


def test_a_gap_between_slices_is_an_error(tmp_path):
    half = torch.ones(2, 4)
    write_dcp(tmp_path, [Slice("a", (2, 4), half.dtype, (0, 0), (4, 4), lambda: half)])
    with pytest.raises(CheckpointError, match="covered by 8 of 16"):
        DcpReader(tmp_path).read("a")


def test_hashes_are_those_of_the_files(tmp_path):
    hashes = write_dcp(tmp_path, [whole(str(index), torch.randn(100)) for index in range(9)], num_workers=3)
    assert len(hashes) == 4
    assert hashes == {name: content_hash(tmp_path / name) for name in hashes}


def test_a_view_of_a_larger_tensor_costs_only_its_own_bytes(tmp_path):
    large = torch.zeros(100_000)
    write_dcp(tmp_path, [whole("a", large[:10])])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 5000


def test_values_of_another_shape_than_announced_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a: \[3\] torch.float32 instead of \[4\]"):
        write_dcp(tmp_path, [Slice("a", (4,), torch.float32, (0,), (4,), lambda: torch.zeros(3))])


def test_an_index_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="builtins.print"):
        DcpReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage"])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=".metadata: cannot be read"):
        DcpReader(tmp_path)


def test_a_damaged_slice_and_a_missing_file_are_named(tmp_path):
    write_dcp(tmp_path, [whole("weights", torch.randn(1000))])
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="weights at byte 0: cannot be read"):
        DcpReader(tmp_path).read("weights")
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file. weights is in it"):
        DcpReader(tmp_path).read("weights")


def test_an_unknown_key_is_named(tmp_path):
    write_dcp(tmp_path, [whole("a", torch.zeros(1))])
    with pytest.raises(CheckpointError, match="no tensor b"):
        DcpReader(tmp_path).read("b")
