"""Convert models between Hugging Face folders and Megatron checkpoints, on a CPU, and prove it.

Tensor by tensor, without building the model: memory holds a few tensors per worker. Nothing is ever half-written.

Examples:
  megatron-cpt convert hf-to-mcore models/Qwen3-0.6B converted/qwen3-0.6b --verify
  megatron-cpt convert mcore-to-hf runs/t/p/50B/main/checkpoints/iter_0001000 out/hf --tokenizer data/tokenizer
  megatron-cpt convert foreign-to-mcore old/iter_0001000 converted/old --params llama-1b --optimizer needed
  megatron-cpt convert foreign-to-hf old/iter_0001000 out/old-hf --params llama-1b --tokenizer data/tokenizer
  megatron-cpt convert init --task tasks/demo --params demo-5m --size 8M --variant base
  megatron-cpt convert latest --task tasks/demo --params demo-5m --size 8M --variant base
  megatron-cpt convert all --task tasks/demo --params demo-5m --size 8M --every 1000
  megatron-cpt convert verify models/Qwen3-0.6B converted/qwen3-0.6b --logits --text sample.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpt.config.loading.resolve import add_run_arguments, load_from_arguments
from megatron_cpt.errors import ConfigError
from megatron_cpt.verbs.model_arguments import params_model, parse_bytes

if TYPE_CHECKING:
    from megatron_cpt.checkpoint.huggingface.vocabulary import VocabExtension


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="WHAT")
    to_mcore = directions.add_parser("hf-to-mcore", help="a Hugging Face folder to <output>/release")
    to_mcore.add_argument("hf_dir", type=Path, help="folder with config.json and *.safetensors")
    to_mcore.add_argument("output", type=Path, help="checkpoints folder to make")
    to_mcore.add_argument("--params", help="params file that must describe the same model (a name or a path)")
    to_mcore.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="padding of the embedding (128)"
    )
    to_mcore.add_argument(
        "--skip-tensors", action="append", default=[], metavar="GLOB", help="leave these tensors out on purpose"
    )
    to_mcore.add_argument(
        "--ignore-config", action="append", default=[], metavar="KEY", help="config.json keys that change nothing"
    )
    to_mcore.add_argument(
        "--drop-mtp", action="store_true", help="leave out the layers that predict further tokens (DeepSeek-V3)"
    )
    to_mcore.add_argument(
        "--extend-vocab",
        type=_rows,
        metavar="ROWS",
        help="grow the vocabulary to this size; auto: a row for each id of --new-tokenizer",
    )
    to_mcore.add_argument(
        "--extend-multiple",
        type=int,
        default=1,
        metavar="N",
        help="round the rows of --extend-vocab up to a multiple (1)",
    )
    to_mcore.add_argument(
        "--extend-method",
        choices=("mean", "noise", "subtokens"),
        default="mean",
        help="new rows: mean of the old ones, that plus noise, or mean of the old sub-tokens (needs --new-tokenizer)",
    )
    to_mcore.add_argument("--new-tokenizer", type=Path, metavar="DIR", help="tokenizer with the new tokens")
    _add_options(to_mcore)
    _add_nonfinite(to_mcore)
    to_hf = directions.add_parser("mcore-to-hf", help="a Megatron checkpoint to a Hugging Face folder")
    to_hf.add_argument("checkpoint", type=Path, help="iter_NNNNNNN, release, or the folder above (newest good one)")
    to_hf.add_argument("output", type=Path, help="Hugging Face folder to make")
    to_hf.add_argument("--tokenizer", type=Path, help="tokenizer folder, tokenizer.json or SentencePiece model to copy")
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (5GB)")
    _add_options(to_hf)
    _add_nonfinite(to_hf)
    foreign = directions.add_parser(
        "foreign-to-mcore", help="a checkpoint of Megatron-LM or DeepSpeed, optimizer too, to <output>/release"
    )
    to_folder = directions.add_parser(
        "foreign-to-hf", help="weights of a checkpoint of Megatron-LM or DeepSpeed to a Hugging Face folder"
    )
    for part in (foreign, to_folder):
        part.add_argument("source", type=Path, help="folder with mp_rank_*/, zero/<parameter>/fp32.pt, or .metadata")
        part.add_argument("output", type=Path, help="folder to make")
        part.add_argument("--params", required=True, help="params file that describes the model (a name or a path)")
        _add_options(part)
    foreign.add_argument(
        "--optimizer",
        choices=("if-there", "needed", "none"),
        default="if-there",
        help="moments and step: take them where they can be mapped, fail without them, or leave them out (if-there)",
    )
    to_folder.add_argument(
        "--tokenizer", type=Path, help="tokenizer folder, tokenizer.json or SentencePiece model to copy"
    )
    latest = directions.add_parser("latest", help="a run's newest good checkpoint to <run>/checkpoints_hf")
    every = directions.add_parser("all", help="every kept checkpoint of a run that is not converted yet")
    every.add_argument("--every", type=int, default=1, metavar="N", help="only iterations that are multiples of N")
    for run_parser in (latest, every):
        add_run_arguments(run_parser)
        _add_options(run_parser)
    start = directions.add_parser(
        "init", help="the checkpoint that a run starts from, to <run>/init, as training itself would make it"
    )
    add_run_arguments(start)
    check = directions.add_parser("verify", help="compare a Hugging Face folder with a Megatron checkpoint")
    check.add_argument("hf_dir", type=Path, help="Hugging Face folder")
    check.add_argument("checkpoint", type=Path, help="Megatron checkpoint")
    check.add_argument("--logits", action="store_true", help="run both models, a layer at a time, and compare logits")
    check.add_argument("--text", type=Path, metavar="FILE", help="text to run them on (default: random tokens)")
    check.add_argument("--num-tokens", type=int, default=512, metavar="N", help="tokens to run them on (512)")
    check.add_argument(
        "--tolerance", type=float, default=0.01, metavar="X", help="largest mean |difference| of logits in fp32 (0.01)"
    )


def run(arguments: argparse.Namespace) -> int | None:
    # torch is imported only when something is converted
    if arguments.direction == "verify":
        return _verify(arguments)
    if arguments.direction == "init":
        return _init(arguments)
    from megatron_cpt.checkpoint.convert.choices import ExportChoices, ImportChoices
    from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
    from megatron_cpt.checkpoint.convert.run_export import export_all, export_latest

    work = {"verify": arguments.verify, "num_workers": arguments.num_workers}
    options = {"dtype": arguments.dtype, **work}
    if arguments.direction == "hf-to-mcore":
        outputs = [
            hf_to_mcore(
                arguments.hf_dir,
                arguments.output,
                model=params_model(arguments.params) if arguments.params else None,
                options=ImportChoices(
                    dtype=arguments.dtype,
                    make_vocab_size_divisible_by=arguments.make_vocab_size_divisible_by,
                    skip_tensors=arguments.skip_tensors,
                    ignore_config=arguments.ignore_config,
                    drop_mtp=arguments.drop_mtp,
                    allow_nonfinite=arguments.allow_nonfinite,
                    extension=_extension(arguments),
                ),
                **work,
            )
        ]
    elif arguments.direction == "mcore-to-hf":
        outputs = [
            mcore_to_hf(
                arguments.checkpoint,
                arguments.output,
                options=ExportChoices(
                    dtype=arguments.dtype,
                    tokenizer=arguments.tokenizer,
                    max_shard_bytes=parse_bytes(arguments.max_shard_size),
                    allow_nonfinite=arguments.allow_nonfinite,
                ),
                **work,
            )
        ]
    elif arguments.direction.startswith("foreign"):
        from megatron_cpt.checkpoint.foreign.convert import foreign_to_hf, foreign_to_mcore

        places = arguments.source, arguments.output, params_model(arguments.params)
        if arguments.direction == "foreign-to-hf":
            outputs = [foreign_to_hf(*places, tokenizer=arguments.tokenizer, **options)]
        else:
            outputs = [foreign_to_mcore(*places, optimizer=arguments.optimizer, **options)]
    elif arguments.direction == "latest":
        outputs = [export_latest(load_from_arguments(arguments).config, **options)]
    else:
        outputs = export_all(load_from_arguments(arguments).config, every=arguments.every, **options)
    sys.stdout.write("".join(f"{output}\n" for output in outputs))
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="type of the output's weights (as they are)")
    parser.add_argument("--verify", action="store_true", help="read the output back and compare it bit by bit")
    parser.add_argument("--num-workers", type=int, default=2, metavar="N", help="threads (2)")


def _init(arguments: argparse.Namespace) -> int:
    """Make what a run starts from; a run that has a checkpoint of its own does not start again."""
    from megatron_cpt.run.directory import run_dir
    from megatron_cpt.run.progress import last_checkpoint
    from megatron_cpt.train.state.start_weights import initial_checkpoint

    config = load_from_arguments(arguments).config
    run = run_dir(config)
    if iteration := last_checkpoint(run):
        sys.stdout.write(f"{run.checkpoints}: at iteration {iteration}, kept: the run does not start again\n")
        return 0
    sys.stdout.write(f"{initial_checkpoint(config, run) or 'init.from_path: not set, random weights'}\n")
    return 0


def _add_nonfinite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-nonfinite", action="store_true", help="let NaN and infinity in weights pass")


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_cpt.checkpoint.convert.verify import compare_weights
    from megatron_cpt.checkpoint.torch_dist.mcore import find_checkpoint

    checkpoint = find_checkpoint(arguments.checkpoint)
    tensors = compare_weights(arguments.hf_dir, checkpoint)
    sys.stdout.write(f"{len(tensors)} tensors are equal bit by bit\n")
    if arguments.logits:
        from megatron_cpt.checkpoint.torch_dist.mcore import manifest_model, read_manifest
        from megatron_cpt.train.tools.logits import compare_logits, text_tokens  # transformers, megatron-core

        model = manifest_model(read_manifest(checkpoint), checkpoint)
        length = min(arguments.num_tokens, model.max_position_embeddings)
        tokens = text_tokens(arguments.hf_dir, arguments.text, length, model.vocab_size)
        sys.stdout.write(compare_logits(arguments.hf_dir, checkpoint, tokens, arguments.tolerance).table())
    return 0


def _extension(arguments: argparse.Namespace) -> VocabExtension | None:
    from megatron_cpt.checkpoint.huggingface.vocabulary import extension_for

    if arguments.extend_vocab is None:
        if arguments.new_tokenizer is not None:
            raise ConfigError("--new-tokenizer: says which ids are new. Give --extend-vocab ROWS (or auto) with it.")
        return None
    return extension_for(
        arguments.hf_dir,
        arguments.new_tokenizer,
        rows=None if arguments.extend_vocab == "auto" else arguments.extend_vocab,
        multiple=arguments.extend_multiple,
        method=arguments.extend_method,
    )


def _rows(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows nor auto")
    return int(text)
