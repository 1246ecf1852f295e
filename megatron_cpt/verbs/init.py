"""Write a task from a model, some text and a number of tokens, and print the command that trains it

Reads the model's config.json and tokenizer and looks at the text: estimated tokens of each corpus, its share, how often
it is read. Sequence length, batch and learning rate follow from the model's size, nodes and layout from the planner's
search for the site's GPUs. Writes TASK_DIR/task.yaml and TASK_DIR/params/MODEL.yaml, with comments on open decisions;
documents are read in place, and outputs are in data/TASK and runs/TASK. Never overwrites.

`--model tiny` makes a model of two layers, and text of this Python where no documents are named: to see every step in a minute.

Examples:
  megatron-cpt init first --model tiny
  megatron-cpt init ja --model models/Llama-3.2-1B --documents ja='corpus/ja/*.jsonl.zst' --replay en='corpus/en/*.parquet' \\
      --tokens 1B --site leonardo
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", type=Path, metavar="TASK_DIR", help="folder to write; its name is the task's")
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a Hugging Face folder, a name on the Hub (OWNER/NAME), or tiny"
    )
    parser.add_argument(
        "--documents",
        action="append",
        default=[],
        metavar="NAME=GLOB",
        help="new text: files, a folder or a glob; repeat",
    )
    parser.add_argument(
        "--replay",
        action="append",
        default=[],
        metavar="NAME=GLOB",
        help="text like the model's own, not to be forgotten",
    )
    parser.add_argument("--tokens", metavar="COUNT", help="length of the stage, such as 1B (tiny: 400K)")
    parser.add_argument("--site", metavar="NAME", help="site file: a name in pbs/sites or slurm/sites, or a path")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="where it is not in the model's folder")
    parser.add_argument(
        "--replay-share", type=float, default=0.1, metavar="PART", help="of the mix that is replay (0.1)"
    )
    parser.add_argument(
        "--held-out",
        metavar="PART",
        help="of the documents that is measured only (1/1000, more of a small corpus; tiny: 1/10)",
    )
    parser.add_argument("--seq-length", type=int, metavar="TOKENS", help="instead of the one proposed")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of one GPU, where the site does not say it"
    )


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.start.init import init_task  # heavy: the readers
    from megatron_cpt.start.named_patterns import named_patterns

    made = init_task(
        arguments.task,
        model=arguments.model,
        documents=named_patterns(arguments.documents, "--documents"),
        replay=named_patterns(arguments.replay, "--replay"),
        tokens=arguments.tokens,
        site=arguments.site,
        tokenizer=arguments.tokenizer,
        replay_share=arguments.replay_share,
        held_out=arguments.held_out,
        seq_length=arguments.seq_length,
        gpu_memory_gib=arguments.gpu_memory,
    )
    sys.stdout.write(made.text())
