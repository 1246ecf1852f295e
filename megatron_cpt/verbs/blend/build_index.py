"""Build the index cache of a stage ahead of training, in a CPU job.

The cache is content-addressed (shard, seed, sequence length, epoch) and appears whole: training, or a second builder,
that starts meanwhile does no harm. Existing indexes are not built again.

Example: megatron-cpt blend build-index --task tasks/demo --params demo-5m --size 8M
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.loading.resolve import add_run_arguments
from megatron_cpt.errors import DataError
from megatron_cpt.verbs.run_arguments import load_run
from megatron_cpt.verbs.vocabulary import add_workers_argument

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_workers_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    # heavy: torch and megatron
    from megatron_cpt.data.blend.plan import plan_blend
    from megatron_cpt.data.blend.start_position import continued_order
    from megatron_cpt.data.tokenizer.interface import load_tokenizer
    from megatron_cpt.run.directory import run_dir
    from megatron_cpt.train.samples.batches import DatasetTokenizer, build_train_dataset, stage_dataset_config
    from megatron_cpt.train.samples.stage_samples import build_train_indexes
    from megatron_cpt.train.stage.validation import build_validation_sets, check_validation_shards

    config = load_run(arguments).config
    if config.data.tokenizer is None:
        raise DataError("data.tokenizer: not set. Its end-of-document id is needed. Name the tokenizer's folder.")
    run = run_dir(config)
    order = plan_blend(config, run.data_list_path, continued_order(config)).order
    found = load_tokenizer(Path(data_path(config.paths, config.data.tokenizer)))
    tokenizer = DatasetTokenizer(found.eod_id, found.vocab_size, found.identity)
    check_validation_shards(config)
    started = time.monotonic()
    if arguments.workers > 1:
        settings = stage_dataset_config(config, order, tokenizer)
        build_train_indexes(config, order, settings, run.cache, arguments.workers)
    dataset = build_train_dataset(config, order, tokenizer, run.cache)
    build_validation_sets(config, tokenizer, run.cache)
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"{run.cache}: {len(dataset):,} samples of {len(order.stage_entries):,} shards in {seconds:.1f} s\n"
    )
