"""Validation losses per corpus while a run trains: forgetting seen as it happens."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.blend.sources import validation_prefixes
from megatron_cpt.data.shards.form import read_shard_form
from megatron_cpt.data.shards.indexed import read_index, read_shard_manifest
from megatron_cpt.errors import DataError
from megatron_cpt.train.samples.batches import DatasetTokenizer, build_validation_dataset, microbatches
from megatron_cpt.train.stage.step import forward_step


@dataclass(frozen=True)
class ValidationSet:
    """A corpus's held-out samples and its bytes of text per token."""

    corpus: str
    dataset: Any
    bytes_per_token: float | None
    """None for masked shards, because the bytes of their learned tokens are unknown."""


def build_validation_sets(config: RunConfig, tokenizer: DatasetTokenizer, cache: Path) -> list[ValidationSet]:
    """Return the validation set of every corpus that has one; empty when evaluation is off.

    Raises: DataError naming held-out shards that are missing.
    """
    if not config.evaluation.eval_interval:
        return []
    sets = []
    for name in config.data.corpora:
        prefixes = _held_out(config, name)
        if not prefixes:
            continue
        dataset = build_validation_dataset(config, prefixes, tokenizer, cache)
        if any(read_shard_form(Path(prefix)).is_masked for prefix in prefixes):
            sets.append(ValidationSet(name, dataset, None))
            continue
        manifests = [read_shard_manifest(Path(prefix)) for prefix in prefixes]
        unknown = [prefix for prefix, manifest in zip(prefixes, manifests, strict=True) if not manifest["bytes"]]
        if unknown:
            raise DataError(
                f"{unknown[0]}: its manifest does not say how many bytes of text it holds. Bits per byte need them. "
                "Adopt the shard again with `megatron-cpt data adopt --count-bytes`."
            )
        num_bytes = sum(manifest["bytes"] for manifest in manifests)
        num_tokens = sum(manifest["tokens"] for manifest in manifests)
        sets.append(ValidationSet(name, dataset, num_bytes / num_tokens))
    return sets


def check_validation_shards(config: RunConfig) -> None:
    """Look at every held-out shard before hours go into indexes.

    Raises: DataError naming one that is missing, damaged, or lacks what its measure needs.
    """
    for name in config.data.corpora if config.evaluation.eval_interval else ():
        for prefix in _held_out(config, name):
            read_index(Path(prefix))
            if not read_shard_form(Path(prefix)).is_masked:
                read_shard_manifest(Path(prefix))


def _held_out(config: RunConfig, corpus: str) -> list[str]:
    problems: list[str] = []
    prefixes = validation_prefixes(config, corpus, problems)
    if problems:
        raise DataError("\n".join(problems))
    return prefixes


@torch.no_grad()
def validation_loss(model: list[Any], validation: ValidationSet, config: RunConfig, eod_id: int) -> dict[str, float]:
    """Return the mean loss in nats per token over the set's first `eval_iters` global batches, and bits per byte.

    Of masked shards only the learned tokens count, and there are no bits per byte.
    """
    batch_size = config.training.global_batch_size
    num_batches = min(math.ceil(len(validation.dataset) / batch_size), config.evaluation.eval_iters)
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for chunk in model:
        chunk.eval()
    schedule = get_forward_backward_func()
    for index in range(num_batches):
        batches = microbatches(validation.dataset, index * batch_size, batch_size, config, eod_id, pad=True)
        iterators = [iter(batches) for _ in model]
        results = schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=len(batches),
            seq_length=config.training.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            forward_only=True,
        )
        for result in results:
            total += result["loss_and_tokens"].double()
    for chunk in model:
        chunk.train()
    if results:  # the last stage holds the sums; every tensor-parallel rank has the same
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(total, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    loss = float(total[0] / total[1].clamp(min=1))
    if validation.bytes_per_token is None:
        return {"loss": loss}
    return {"loss": loss, "bits_per_byte": loss / math.log(2) / validation.bytes_per_token}
