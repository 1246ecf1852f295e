"""Training loads a checkpoint from what was approved: an attack in any pickle of it is refused on load, and runs nothing."""

from pathlib import Path

import pytest

from megatron_cpt.errors import CheckpointError
from tests.hostile import attacks, running


def load_everything(folder: str) -> dict[str, bool]:
    """Save a tensor and an object, then load them with each attack in the index and in the objects; return what was marked."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.state.approved import load_approved
    from tests.train.tiny import tiny_config

    initialize_parallel(tiny_config())

    def asked(value=0.0, content=None):
        tensor = ShardedTensor.from_rank_offsets("a", torch.full((4,), value))
        return {"a": tensor, "b": ShardedObject("b", content, (1,), (0,)), "c": content}

    whole = Path(folder, "whole")
    whole.mkdir()
    dist_checkpointing.save(asked(3.0, {"x": 1}), str(whole), async_strategy="mcore")
    loaded = load_approved({name: value for name, value in asked().items() if name != "c"}, whole)
    assert loaded["a"].tolist() == [3.0] * 4 and loaded["b"] == {"x": 1} and loaded["c"] == {"x": 1}

    def tried(load, mark):
        try:
            load({name: value for name, value in asked().items() if name != "c"}, whole)
            outcome = "loaded"
        except CheckpointError:
            outcome = "refused"
        except BaseException as problem:  # torch's CheckpointException is no Exception
            outcome = type(problem).__name__
        was_marked = mark.exists()
        mark.unlink(missing_ok=True)
        return outcome, was_marked

    results = {}
    mark = Path(folder, "mark")
    index, objects = whole / ".metadata", next(path for path in whole.glob("*.distcp") if path.stat().st_size)
    for target in (index, objects):
        original = target.read_bytes()
        for name, content in attacks(mark).items() if target is index else running(mark).items():
            target.write_bytes(content if target is index else with_object(original, content))
            results[f"{target.name} {name}"] = tried(load_approved, mark)
            if name in running(mark):
                results[f"plain {target.name} {name}"] = tried(
                    lambda state, folder: dist_checkpointing.load(state, str(folder)), mark
                )
        target.write_bytes(original)
    finish_parallel()
    return results


def with_object(part: bytes, attack: bytes) -> bytes:
    """Return a file of slices that starts with the attack, which torch then takes for a file from before 1.6."""
    return (attack + part)[: len(part)]


@pytest.mark.slow
def test_megatron_core_gets_what_was_approved(ranks, tmp_path):
    results = ranks.run(load_everything, 1, str(tmp_path))[0]
    ours = {name: result for name, result in results.items() if not name.startswith("plain")}
    assert ours and all(outcome == "refused" and not marked for outcome, marked in ours.values()), ours
    plain = {name: marked for name, (_, marked) in results.items() if name.startswith("plain .metadata")}
    assert all(plain.values()), plain  # the attacks are attacks
