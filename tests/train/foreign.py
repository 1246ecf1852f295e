"""Steps that ranks run in the tests of foreign checkpoints: Megatron's torch format as megatron-core itself writes it."""

import argparse
from pathlib import Path
from typing import Any

from megatron_cpt.config.settings.schema import RunConfig
from tests.train.tiny import batches


def train_and_write_torch_format(config: RunConfig, root: str, ours: str) -> int:
    """Train two steps, write `<root>/mp_rank_*` as Megatron-LM would and the same state as our checkpoint; return step."""
    import torch
    from megatron.core import parallel_state

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model, unwrap
    from megatron_cpt.train.stage.step import train_step
    from megatron_cpt.train.state.checkpointing import save_checkpoint
    from tests.train.tiny import manifest_of

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    for step in range(2):
        train_step(model, optimizer, batches(config, step), config, 1e-3)
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    has_stages = parallel_state.get_pipeline_model_parallel_world_size() > 1
    folder = Path(root) / (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if has_stages else ""))
    chunks = {
        "model" if len(model) == 1 else f"model{index}": unwrap(chunk).state_dict() for index, chunk in enumerate(model)
    }
    state: dict[str, Any] = {**chunks, "optimizer": optimizer.state_dict(), "iteration": 2, "checkpoint_version": 3.0}
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"args": argparse.Namespace(bf16=True)}, folder / "model_optim_rng.pt")
    torch.distributed.barrier()
    if config.parallel.use_distributed_optimizer:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.data_parallel_group_gloo = part.data_parallel_group
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
        save_checkpoint(Path(ours), 2, model, optimizer, manifest_of(config, 2))
    finish_parallel()
    return 2


def load_and_save(
    config: RunConfig, source: str, target: str, next_step: int | None = None
) -> int | tuple[float, float]:
    """Load a checkpoint with its optimizer under `config`'s layout and save what the ranks then hold.

    Return the optimizer's number of updates; with `next_step` run that step, return its loss and gradient norm.
    """
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step
    from megatron_cpt.train.state.checkpointing import load_checkpoint, save_checkpoint
    from tests.train.tiny import manifest_of

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    load_checkpoint(Path(source), model, optimizer)
    steps = {group["step"] for group in optimizer.param_groups}
    save_checkpoint(Path(target), 1, model, optimizer, manifest_of(config, 1))
    result = train_step(model, optimizer, batches(config, next_step), config, 1e-3) if next_step is not None else None
    finish_parallel()
    (step,) = steps
    return int(step) if result is None else (result.loss, result.grad_norm)
