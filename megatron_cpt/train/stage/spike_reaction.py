"""The action after a loss spike: a report of the step's samples and, if configured, a roll-back."""

import logging
from collections import Counter
from typing import Any

from megatron_cpt.checkpoint.torch_dist.mcore import newest_good_checkpoint, read_manifest
from megatron_cpt.train.backend.parallel import on_rank_0
from megatron_cpt.train.samples.skipped_iterations import append_line
from megatron_cpt.train.stage.saving import Saver
from megatron_cpt.train.stage.setup import Stage, go_back
from megatron_cpt.train.watch.metrics import MetricsWriter
from megatron_cpt.train.watch.spikes import Spike, may_roll_back, skip_line

logger = logging.getLogger(__name__)


def react(stage: Stage, saver: Saver, writer: MetricsWriter, spike: Spike, iteration: int) -> bool:
    """Report a spike at `iteration`; return whether the stage went back to its last checkpoint.

    Without a checkpoint of its own, or after `training.spike_max_rollbacks`, a run continues.
    """
    first, last = stage.sizes.samples(iteration - 1), stage.sizes.samples(iteration)
    shards = Counter(stage.entries[number].prefix for number in stage.dataset.dataset_index[first:last].tolist())
    logger.warning(
        "iteration %d: SPIKE, loss %.4f above the median %.4f by %.1f deviations; samples %d to %d of %s",
        iteration, spike.loss, spike.median, (spike.loss - spike.median) / spike.deviation, first, last - 1,
        ", ".join(f"{prefix} ({count})" for prefix, count in shards.most_common()),
    )  # fmt: skip
    documents = _documents(stage, first, last) if writer.is_writer else {}
    writer.write(
        "spike",
        iteration=iteration,
        consumed_tokens=stage.tokens(iteration),
        loss=spike.loss,
        median=spike.median,
        deviation=spike.deviation,
        first_sample=first,
        last_sample=last - 1,
        shards=dict(shards),
        documents=documents,
    )
    if stage.config.training.spike_action != "rollback":
        return False
    saver.finish(iteration, [], is_blocking=True)
    line = on_rank_0(lambda: _skip_in_future(stage, spike, iteration))
    if line is None:
        return False
    go_back(stage)
    logger.warning("went back to iteration %d; skipping %s", stage.iteration, line.strip())
    writer.write(
        "rollback", iteration=stage.iteration, consumed_tokens=stage.tokens(stage.iteration), skipped=line.split()[0]
    )
    return True


def _documents(stage: Stage, first: int, last: int) -> dict[str, list[int]]:
    """Return the documents of each shard in samples `first` to `last`; `megatron-cpt data trace` finds file and line."""
    found: dict[str, set[int]] = {}
    for sample in range(first, last):
        number = int(stage.dataset.dataset_index[sample])
        shard = stage.dataset.shards[number]
        assert shard is not None, f"entry {number} gives no sample"
        spans = shard.spans(int(stage.dataset.sample_index[sample]))
        found.setdefault(stage.entries[number].prefix, set()).update(document for document, _, _ in spans)
    return {prefix: sorted(documents) for prefix, documents in found.items()}


def _skip_in_future(stage: Stage, spike: Spike, iteration: int) -> Any:
    """Add the spike's iterations to `skip_iterations.txt` and return the line; None when there is no way back."""
    training, path = stage.config.training, stage.run.skip_iterations_path
    if not may_roll_back(training, path.read_text(encoding="utf-8") if path.exists() else ""):
        logger.warning(
            "no roll-back: there were %d already (training.spike_max_rollbacks)", training.spike_max_rollbacks
        )
        return None
    checkpoint = newest_good_checkpoint(stage.run.checkpoints, stage.config.checkpoint.verify_on_load)
    if checkpoint is None:
        logger.warning("no roll-back: the run has no checkpoint yet")
        return None
    saved = int(read_manifest(checkpoint)["iteration"])
    if saved >= iteration:  # an asynchronous save failed just now and was done again, after the spike
        logger.warning("no roll-back: the newest checkpoint is from iteration %d", saved)
        return None
    line = skip_line(spike, iteration, saved, training)
    append_line(path, line)
    return line
