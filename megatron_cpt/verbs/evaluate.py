"""measure models on text: bits per byte, what was learned and forgotten, samples, weight divergence

A model is a Hugging Face folder or a Megatron checkpoint (`.../checkpoints`, `.../iter_0001000`), or the newest export of a
run (`.../checkpoints_hf`), written NAME=PATH. A text set is a .jsonl or .txt file (plain or compressed), a folder or a glob,
written NAME=PATH; a name that comes several times is one set of several paths. A result that is on disk already, of the
same model and text, is kept.

  perplexity   bits per byte with 95 % intervals, per model and text set
  forgetting   the same, compared with the first model: learned, forgotten; a table, a chart, JSON. With --series the
               models are stages in order, and each is also compared with the previous one
  generate     continuations of prompts, side by side; with --chat answers to them
  harness      tasks of lm-evaluation-harness, if it is installed; options after -- are its own
  divergence   how far each layer's weights moved from the first model's; a table and a chart
  sweep        compare the points of `submit sweep` by learning and forgetting; a table, a chart, JSON

Examples:
  megatron-cpt evaluate forgetting --model base=hf/base --model cpt=runs/ja/8b/80B/main/checkpoints \\
      --text D0=data/D0.validation.jsonl.zst --text D1=data/D1.validation.jsonl.zst --output evaluation
  megatron-cpt evaluate perplexity --model base=hf/base --text D0=data/D0.validation.jsonl.zst --output base.json
  megatron-cpt evaluate generate --model base=hf/base --model cpt=hf/cpt --prompt 'Once upon a time' --output samples.json
  megatron-cpt evaluate harness --model cpt=hf/cpt --tasks hellaswag,arc_easy --output harness
  megatron-cpt evaluate divergence --model base=hf/base --model cpt=hf/cpt --output divergence
  megatron-cpt evaluate sweep runs/demo/demo-5m/300K/replay+sweep --output sweep
"""

import argparse
import logging
import sys
from pathlib import Path

from megatron_cpt.errors import ConfigError

logger = logging.getLogger(__name__)

HELP = {
    "perplexity": "bits per byte with 95 %% intervals",
    "forgetting": "what a series of models learned and forgot",
    "generate": "continuations of prompts, side by side",
    "divergence": "how far each layer's weights moved",
    "harness": "tasks of lm-evaluation-harness",
    "sweep": "compare the points of a sweep",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    for name, function in (
        ("perplexity", _perplexity),
        ("forgetting", _forgetting),
        ("generate", _generate),
        ("divergence", _divergence),
        ("harness", _harness),
    ):
        part = subparsers.add_parser(name, help=HELP[name])
        part.set_defaults(function=function)
        part.add_argument(
            "--model", action="append", required=True, metavar="NAME=PATH", help="a model; repeat for more"
        )
        if name != "divergence":
            part.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer of models that have none")
        if name in ("perplexity", "forgetting"):
            part.add_argument("--text", action="append", required=True, metavar="NAME=PATH", help="a set of documents")
            part.add_argument("--context", type=int, metavar="TOKENS", help="window length; default: the model's own")
            part.add_argument("--stride", type=int, metavar="TOKENS", help="advance of windows; default: the context")
            part.add_argument("--max-documents", type=int, metavar="N", help="first N documents of each set only")
        if name == "forgetting":
            part.add_argument("--series", action="store_true", help="compare each model with the one before it too")
        if name == "perplexity":
            part.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
        if name in ("forgetting", "divergence", "harness"):
            part.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results")
        if name == "harness":
            part.add_argument("--tasks", required=True, metavar="TASK,TASK", help="names of the harness's tasks")
            part.add_argument("options", nargs="*", metavar="-- OPTION", help="options of lm_eval itself")
        if name == "generate":
            part.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="a text to continue")
            part.add_argument(
                "--chat",
                nargs="?",
                const="",
                metavar="TEMPLATE",
                help="prompts are a user's turns: write them by this template (a file, chatml, llama3), or by the tokenizer's own",
            )
            part.add_argument("--tokens", type=int, default=64, metavar="N", help="length of a continuation (64)")
            part.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): most likely")
            part.add_argument("--seed", type=int, default=1234, metavar="N", help="of sampling (1234)")
            part.add_argument("--output", type=Path, metavar="FILE", help="write the texts as JSON, for `report`")
    sweep = subparsers.add_parser("sweep", help=HELP["sweep"])
    sweep.set_defaults(function=_sweep)
    sweep.add_argument("folder", type=Path, metavar="SWEEP", help="folder with sweep.json, VARIANT+sweep")
    sweep.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results")


def run(arguments: argparse.Namespace) -> None:
    # every measure imports what it needs itself: torch, transformers and matplotlib take seconds to start
    arguments.function(arguments)


def _perplexity(arguments: argparse.Namespace) -> None:
    from megatron_cpt.evaluate.models.forgetting import perplexity_table
    from megatron_cpt.files import write_json

    results, inputs = _measure(arguments, arguments.output)
    if arguments.output:
        content = {"format": 1, "inputs": inputs, "results": [result.as_json() for result in results]}
        write_json(arguments.output, content)
    sys.stdout.write(perplexity_table(results) + "\n")


def _forgetting(arguments: argparse.Namespace) -> None:
    from megatron_cpt.evaluate.models.forgetting import (
        as_json,
        compare_with_first,
        compare_with_previous,
        forgetting_table,
    )
    from megatron_cpt.evaluate.report.drawing import colours
    from megatron_cpt.evaluate.report.plots import plot_forgetting
    from megatron_cpt.files import write_json, write_text

    results, inputs = _measure(arguments, arguments.output / "forgetting.json")
    changes = compare_with_first(results)
    table = forgetting_table(changes)
    content, colour = as_json(results, changes), colours(result.model for result in results)
    content["inputs"] = inputs
    plot_forgetting(changes, colour, arguments.output / "forgetting.png")
    if arguments.series:
        steps = compare_with_previous(results)
        table += "\n\n" + forgetting_table(steps)
        content["stages"] = as_json([], steps)["changes"]
        plot_forgetting(steps, colour, arguments.output / "stages.png")
    write_json(arguments.output / "forgetting.json", content)
    write_text(arguments.output / "forgetting.md", table + "\n")
    sys.stdout.write(table + "\n")


def _generate(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.chat.template import load_template
    from megatron_cpt.evaluate.models.generation import continuations, side_by_side
    from megatron_cpt.evaluate.models.language_model import loaded_model
    from megatron_cpt.files import write_json

    texts: dict[str, list[str]] = {}
    path_of_template = Path(arguments.chat) if arguments.chat else None
    for name, path in _named_models(arguments.model).items():
        with loaded_model(name, path, arguments.tokenizer) as model:
            template = None
            if arguments.chat is not None:
                template = load_template(Path(model.tokenizer.name_or_path), path_of_template)
            texts[name] = continuations(
                model,
                arguments.prompt,
                num_tokens=arguments.tokens,
                temperature=arguments.temperature,
                seed=arguments.seed,
                template=template,
            )
    if arguments.output:
        write_json(arguments.output, {"format": 1, "prompts": arguments.prompt, "texts": texts})
    sys.stdout.write(side_by_side(arguments.prompt, texts))


def _harness(arguments: argparse.Namespace) -> None:
    from megatron_cpt.evaluate.models.harness import run_harness

    for name, path in _named_models(arguments.model).items():
        output = arguments.output / name
        run_harness(path, arguments.tasks.split(","), output, tokenizer=arguments.tokenizer, options=arguments.options)
        sys.stdout.write(f"{output}\n")


def _divergence(arguments: argparse.Namespace) -> None:
    from megatron_cpt.evaluate.models.weights import divergence_table, layer_divergence
    from megatron_cpt.evaluate.report.plots import plot_divergence
    from megatron_cpt.files import write_json

    models = _named_models(arguments.model)
    (base, base_path), *others = models.items()
    if not others:
        raise ConfigError(f"--model {base}: one model only. A base and at least one other are needed. Add a --model.")
    divergence = {name: layer_divergence(path, base_path) for name, path in others}
    write_json(arguments.output / "divergence.json", {"format": 1, "base": base, "divergence": divergence})
    plot_divergence(divergence, base, arguments.output / "divergence.png")
    sys.stdout.write(divergence_table(divergence) + "\n")


def _sweep(arguments: argparse.Namespace) -> None:
    from megatron_cpt.evaluate.report.sweep import write_sweep_report

    sys.stdout.write(write_sweep_report(arguments.folder, arguments.output) + "\n")


def _measure(arguments: argparse.Namespace, output: Path | None) -> tuple[list, dict]:
    """Return every model's result on every text set, and their inputs; valid results in `output` are kept."""
    from megatron_cpt.evaluate.models.kept import kept_results, measured_inputs
    from megatron_cpt.evaluate.models.language_model import loaded_model
    from megatron_cpt.evaluate.models.perplexity import measure_perplexity
    from megatron_cpt.evaluate.models.texts import read_text_set

    models, texts = _named_models(arguments.model), named_sets(arguments.text)
    options = {"context": arguments.context, "stride": arguments.stride, "max_documents": arguments.max_documents}
    inputs = measured_inputs(models, texts, arguments.tokenizer, options)
    found = kept_results(output, inputs)
    missing = {name: [text for text in texts if (name, text) not in found] for name in models}
    needed = dict.fromkeys(text for names in missing.values() for text in names)
    sets = {text: read_text_set(text, texts[text], arguments.max_documents) for text in needed}
    for name, path in models.items():
        if not missing[name]:
            logger.info("%s: %s: kept, measured already on the same texts", output, name)
            continue
        with loaded_model(name, path, arguments.tokenizer) as model:
            for text in missing[name]:
                found[name, text] = measure_perplexity(
                    model, sets[text], context=arguments.context, stride=arguments.stride
                )
    return [found[name, text] for name in models for text in texts], inputs


def named_sets(arguments: list[str]) -> dict[str, list[Path]]:
    """Return name -> paths of `NAME=PATH` arguments; the paths of one name are one set.

    Raises: ConfigError when a name or a path is empty.
    """
    sets: dict[str, list[Path]] = {}
    for argument in arguments:
        ((name, path),) = named_paths([argument], "--text").items()
        sets.setdefault(name, []).append(path)
    return sets


def _named_models(arguments: list[str]) -> dict[str, Path]:
    """Return name -> path of `--model` arguments; a folder of exports stands for its newest one."""
    from megatron_cpt.evaluate.models.folders import newest_export

    return {name: newest_export(path) for name, path in named_paths(arguments, "--model").items()}


def named_paths(arguments: list[str], option: str) -> dict[str, Path]:
    """Return name -> path of `NAME=PATH` arguments; a bare PATH is named by its last part.

    Raises: ConfigError when a name comes twice.
    """
    named: dict[str, Path] = {}
    for argument in arguments:
        name, has_name, path = argument.partition("=")
        if not has_name:
            name, path = Path(argument).name, argument
        if not name or not path or name in named:
            raise ConfigError(
                f"{option} {argument}: the name is {'taken' if name in named else 'or path is empty'}. "
                "Each needs a name of its own: NAME=PATH."
            )
        named[name] = Path(path)
    return named
