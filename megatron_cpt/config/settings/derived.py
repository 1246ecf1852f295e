"""Numbers that follow from the settings: iterations, samples, padded vocabulary, head sizes, data-parallel size."""

import math
from fractions import Fraction

from megatron_cpt.config.settings.batch_sizes import batch_sizes
from megatron_cpt.config.settings.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_cpt.config.settings.values import ALL_SETTINGS, Duration
from megatron_cpt.errors import ConfigError


def train_iters(training: TrainingConfig) -> int:
    """Return the stage's iterations: stated, or as many as its samples or tokens need, the last one whole.

    `ceil(tokens / seq_length / global_batch_size)` as in LLM-jp's mid-training scripts, in integers; steps of a batch
    ramp-up count with their own sizes.
    """
    if training.train_iters is not None:
        return training.train_iters
    if training.train_samples is not None:
        return batch_sizes(training).iterations(training.train_samples)
    if training.train_tokens is not None:
        return batch_sizes(training).iterations(-(-training.train_tokens // training.seq_length))
    if training.train_epochs is not None:
        raise ConfigError(
            f"training.train_epochs is {training.train_epochs:g} and the token files have not been counted. "
            "`megatron-cpt blend plan` counts them; this command needs train_tokens, train_samples or train_iters."
        )
    raise ConfigError("training: no length. Set one of train_tokens, train_samples, train_iters and train_epochs.")


def stage_corpora(data: DataConfig) -> list[str]:
    """Return the corpora that a stage reads by name: those of the mix, or with rules all that have token files."""
    if data.rules:
        return [name for name, corpus in data.corpora.items() if corpus.tokens]
    return [name for name in data.corpora if name in data.mix]


def train_samples(training: TrainingConfig) -> int:
    """Return the stage's samples: whole global batches."""
    return batch_sizes(training).samples(train_iters(training))


def train_tokens(training: TrainingConfig) -> int:
    """Return the tokens the stage really sees: its samples times seq_length."""
    return train_samples(training) * training.seq_length


def padded_vocab_size(model: ModelConfig) -> int:
    """Return the rows of the embedding: vocab_size rounded up to make_vocab_size_divisible_by."""
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def num_query_groups(model: ModelConfig) -> int:
    """Return the key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def kv_channels(model: ModelConfig) -> int:
    """Return the dimension of one attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def rope_original_max_position_embeddings(model: ModelConfig) -> int:
    """Return the context length that the rotary frequencies were made for, before scaling."""
    return model.rope_original_max_position_embeddings or model.max_position_embeddings


def duration_samples(duration: Duration, training: TrainingConfig, *, is_at_end: bool = False) -> int:
    """Return a duration of a stage in samples: iterations are the stage's first ones, or with `is_at_end` its last.

    A fraction at the end leaves the rest of the stage, so that fractions which sum to 1 meet.
    """
    if duration.unit == "iterations":
        sizes, count = batch_sizes(training), math.ceil(duration.amount)
        if not is_at_end:
            return sizes.samples(count)
        return train_samples(training) - sizes.samples(max(train_iters(training) - count, 0))
    total = train_samples(training)
    if is_at_end and duration.unit == "fraction":
        return math.floor(Fraction(str(duration.amount)) * total)
    return duration.samples(
        global_batch_size=training.global_batch_size, seq_length=training.seq_length, train_samples=total
    )


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Return the ranks that share one copy of the model: TP x PP x CP."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def megatron_virtual_size(parallel: ParallelConfig) -> int | None:
    """Return the virtual pipeline size as Megatron-Core wants it: None where each stage has one chunk."""
    size = parallel.virtual_pipeline_model_parallel_size
    return None if size == 1 else size


def stated_last_stage_layers(parallel: ParallelConfig) -> int | None:
    """Return the last stage's layers where they do not follow from the first's.

    With two stages they do, and Megatron-Core divides by the number of stages in between when both are stated.
    """
    is_implied = parallel.pipeline_model_parallel_size == 2 and parallel.num_layers_in_first_pipeline_stage is not None
    return None if is_implied else parallel.num_layers_in_last_pipeline_stage


def world_size(config: RunConfig) -> int:
    """Return the ranks of a training job: nodes x ranks per node."""
    return config.launch.nodes * config.launch.gpus_per_node


def data_parallel_size(config: RunConfig) -> int:
    """Return DP: the copies of the model in a training job."""
    return max(world_size(config) // model_parallel_size(config.parallel), 1)


def num_microbatches(config: RunConfig) -> int:
    """Return the micro-batches of one rank in one iteration."""
    training = config.training
    return math.ceil(training.global_batch_size / (training.micro_batch_size * data_parallel_size(config)))


def may_change_data_list(checkpoint: CheckpointConfig) -> bool:
    """Return whether a started run can read another data list: it follows from the length and the data."""
    return any(key.split(".")[0] in (ALL_SETTINGS, "training", "data") for key in checkpoint.accept_changes)
