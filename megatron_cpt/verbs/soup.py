"""Merge models: a run's last checkpoints, listed iterations, several runs, or any Hugging Face folders.

Methods: `average` (the default) is our own streaming mean in float32; every other one (linear, slerp, ties, dare_ties,
model_stock ...) runs mergekit with a configuration written here, and --config runs a mergekit YAML of your own.
With --match-names only tensors that are in every model are merged, the others stay as the base (or first) model has them.
--direct averages Megatron checkpoints without exports. --greedy adds a model only where it lowers bits per byte on --text.
The output holds model, tokenizer, configuration and merge_info.json (inputs with hashes, names that matched or not).

Examples:
  megatron-cpt soup --task tasks/demo --params demo-5m --size 8M --last 3 --output out/soup
  megatron-cpt soup --inputs hf/a hf/b hf/c --base hf/base --match-names --output out/soup
  megatron-cpt soup --inputs hf/a hf/b --base hf/a --method slerp --set t=0.5 --output out/slerp
  megatron-cpt soup --config merge/cfg.yaml --output out/merged
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_cpt.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is merged")
    what.add_argument(
        "--inputs", nargs="+", type=Path, metavar="DIR", help="Hugging Face folders, or Megatron checkpoints"
    )
    what.add_argument(
        "--task", type=Path, metavar="DIR", help="task of the run whose checkpoints are merged, or the run's directory"
    )
    what.add_argument("--params", metavar="NAME", help="params file of the run")
    what.add_argument("--size", metavar="SIZE", help="size of the run")
    what.add_argument(
        "--variant", action="append", metavar="NAME", help="variant of the run (main); repeat for several runs"
    )
    what.add_argument("--last", type=int, metavar="K", help="the run's last K checkpoints")
    what.add_argument("--iterations", metavar="I,J,...", help="these iterations of the run")
    what.add_argument(
        "--base", type=Path, metavar="DIR", help="base model, included in a mean; base_model of other methods"
    )
    what.add_argument("--config", type=Path, metavar="FILE", help="a mergekit YAML of your own")
    how = parser.add_argument_group("how")
    how.add_argument("--method", default="average", metavar="NAME", help="average (ours), or a method of mergekit")
    how.add_argument("--weights", metavar="W,W,...", help="a weight for each input (1 each)")
    how.add_argument(
        "--set", action="append", default=[], metavar="KEY=NUMBER", help="a parameter of the method, such as t=0.5"
    )
    how.add_argument("--match-names", action="store_true", help="merge what matches, keep and report the rest")
    how.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("skipped", "mismatched", "configuration", "tokenizer"),
        help="a difference that is meant; repeat for more",
    )
    how.add_argument(
        "--direct", choices=("megatron", "huggingface"), help="average Megatron checkpoints into this format"
    )
    how.add_argument("--greedy", action="store_true", help="keep a model only where it lowers bits per byte on --text")
    how.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="held-out documents that score --greedy"
    )
    how.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="type of the output's weights (the first model's)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")


def run(arguments: argparse.Namespace) -> int | None:
    _check(arguments)
    # torch is imported only now
    from megatron_cpt.checkpoint.soup import mergekit

    allow = [*arguments.allow, *(("skipped", "mismatched") if arguments.match_names else ())]
    weights = [float(part) for part in arguments.weights.split(",")] if arguments.weights else None
    if arguments.config is not None:
        output = mergekit.run_mergekit(arguments.config, arguments.output, allow=allow)
    elif arguments.direct is not None:
        output = _direct(arguments, weights)
    else:
        output = _merge(arguments, _inputs(arguments), weights, allow)
    sys.stdout.write(f"{output}\n")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together."""
    if arguments.set and arguments.method == "average":
        raise ConfigError(f"--set: {arguments.set[0]} belongs to a method of mergekit. Name it with --method.")
    if arguments.greedy and (arguments.weights or not arguments.text or arguments.method != "average"):
        raise ConfigError(
            "--greedy: averages, weighs all alike and scores on --text. Give --text, no --weights or --method."
        )
    if arguments.direct and (arguments.base or arguments.greedy or arguments.method != "average"):
        raise ConfigError("--direct: averages Megatron checkpoints only. Leave out --base, --greedy and --method.")


def _merge(arguments: argparse.Namespace, inputs: list[Path], weights: list[float] | None, allow: list[str]) -> Path:
    from megatron_cpt.checkpoint.soup import mean as soup
    from megatron_cpt.checkpoint.soup import mergekit

    if arguments.method != "average":
        config = mergekit.mergekit_config(
            inputs,
            method=arguments.method,
            weights=weights,
            base=arguments.base,
            parameters=_numbers(arguments.set),
            dtype={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[arguments.dtype or "bf16"],
        )
        return mergekit.run_mergekit(config, arguments.output, allow=allow)
    if arguments.greedy:
        candidates = [*inputs, *([arguments.base] if arguments.base else [])]
        output, steps = soup.greedy_soup(
            candidates, arguments.output, _scorer(arguments.text), dtype=arguments.dtype, allow=allow
        )
        for step in steps:
            sys.stdout.write(f"{'+' if step['kept'] else '-'} {step['score']:.4f} bits per byte with {step['added']}\n")
        return output
    return soup.average_hf(
        inputs, arguments.output, weights=weights, base=arguments.base, dtype=arguments.dtype, allow=allow
    )


def _direct(arguments: argparse.Namespace, weights: list[float] | None) -> Path:
    from megatron_cpt.checkpoint.convert.run_export import tokenizer_path
    from megatron_cpt.checkpoint.soup.megatron import average_checkpoints

    checkpoints = list(arguments.inputs or ())
    tokenizer = None
    for config in _configs(arguments):
        checkpoints += _checkpoints(arguments, config)
        tokenizer = tokenizer_path(config)
    return average_checkpoints(
        checkpoints, arguments.output, weights=weights, to=arguments.direct, tokenizer=tokenizer, dtype=arguments.dtype
    )


def _inputs(arguments: argparse.Namespace) -> list[Path]:
    """Return Hugging Face folders: those given, and exports (made now where missing) of the runs' checkpoints."""
    from megatron_cpt.checkpoint.convert.run_export import export_checkpoint

    inputs = list(arguments.inputs or ())
    for config in _configs(arguments):
        inputs += [export_checkpoint(config, checkpoint) for checkpoint in _checkpoints(arguments, config)]
    if not inputs:
        raise ConfigError(
            "soup: nothing to merge. Name --inputs, or --task, --params and --size with --last or --iterations."
        )
    return inputs


def _configs(arguments: argparse.Namespace) -> list[Any]:
    from megatron_cpt.config.loading.resolve import load_from_arguments

    if arguments.task is None:
        return []
    configs = []
    for variant in arguments.variant or [None]:
        named = {"task": arguments.task, "params": arguments.params, "size": arguments.size, "variant": variant}
        configs.append(load_from_arguments(argparse.Namespace(**named, site=None, overrides=[])).config)
    return configs


def _checkpoints(arguments: argparse.Namespace, config: Any) -> list[Path]:
    from megatron_cpt.checkpoint.torch_dist.mcore import checkpoint_dir, list_checkpoints, verify_checkpoint
    from megatron_cpt.run.directory import run_dir

    root = run_dir(config).checkpoints
    kept = [iteration for iteration in list_checkpoints(root) if isinstance(iteration, int)]
    if arguments.iterations:
        wanted = [int(part) for part in arguments.iterations.split(",")]
    elif arguments.last:
        wanted = kept[-arguments.last :]
    else:
        raise ConfigError("--task: which checkpoints? Give --last K or --iterations I,J,...")
    if arguments.last and len(wanted) < arguments.last:
        raise ConfigError(f"{root}: {len(kept)} checkpoints. {arguments.last} are asked for. Use a smaller --last.")
    for iteration in wanted:
        verify_checkpoint(checkpoint_dir(root, iteration), "size")
    return [checkpoint_dir(root, iteration) for iteration in wanted]


def _scorer(texts: list[str]) -> Any:
    """Return a function Hugging Face folder -> bits per byte over all documents of `texts`."""
    from megatron_cpt.evaluate.models.language_model import loaded_model
    from megatron_cpt.evaluate.models.perplexity import measure_perplexity
    from megatron_cpt.evaluate.models.texts import read_text_set

    held_out = read_text_set("held-out", texts)

    def score(path: Path) -> float:
        with loaded_model(path.name, path) as model:
            return measure_perplexity(model, held_out).bits_per_byte

    return score


def _numbers(pairs: list[str]) -> dict[str, float | bool]:
    numbers: dict[str, float | bool] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            numbers[key] = value == "true" if value in ("true", "false") else float(value)
        except ValueError:
            raise ConfigError(f"--set: {pair!r}. KEY=NUMBER, true or false is needed, such as t=0.5.") from None
    return numbers
