"""Write the architecture of a Hugging Face folder as a params file, or print it

Every key of config.json is used, known to be harmless, or refused by name. Batch, learning rate and layout are `init`'s, or yours.

Example: megatron-cpt params from-hf models/Llama-3.2-1B --output params/NAME.yaml
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="Hugging Face folder with config.json")
    parser.add_argument("--output", type=Path, metavar="FILE", help="params file to write (default: print it)")


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.errors import ConfigError
    from megatron_cpt.files import write_text
    from megatron_cpt.start.params_file import inline, model_section, read_model

    lines = [
        f"# Architecture: config.json of {arguments.model}.",
        f"description: {inline(arguments.model.resolve().name)}",
    ]
    text = "\n".join([*lines, "", *model_section(read_model(arguments.model))]) + "\n"
    if arguments.output is None:
        sys.stdout.write(text)
        return
    if arguments.output.exists():
        raise ConfigError(
            f"{arguments.output}: exists already. A params file is never overwritten. Choose another name."
        )
    write_text(arguments.output, text)
    sys.stdout.write(f"{arguments.output}\n")
