"""write the completion script of a shell: verbs, sub-verbs and options, with no program started while one types

bash reads it from a file that it sources, zsh too (after `autoload -Uz compinit && compinit`), fish from its completions folder. It
is a list of the words of this version: write it again after an upgrade.

Examples:
  megatron-cpt completion bash --output ~/.local/share/bash-completion/completions/megatron-cpt
  megatron-cpt completion zsh --output ~/.megatron-cpt.zsh
  megatron-cpt completion fish --output ~/.config/fish/completions/megatron-cpt.fish
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose script to write")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write it; default: standard output")


def run(arguments: argparse.Namespace) -> int:
    """Write the script."""
    from megatron_cpt.files import write_text
    from megatron_cpt.verbs.completion_script import completion_script

    script = completion_script(arguments.shell)
    if arguments.output is None:
        sys.stdout.write(script)
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output, script)
    return 0
