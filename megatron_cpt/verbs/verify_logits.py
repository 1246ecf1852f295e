"""Compare a Hugging Face folder with a Megatron checkpoint by what they compute; exit 1 when they differ.

The same random tokens go through transformers and through megatron-core on one rank. The largest and the mean difference
of the logits, the difference of the loss and the agreement on the most likely token are printed; the mean is checked,
against 1e-4 in fp32 and 0.1 in bf16 unless --tolerance says otherwise. `convert verify` compares weights bit by bit.

Example: megatron-cpt verify-logits runs/t/p/50B/main/checkpoints_hf/iter_0001000 runs/t/p/50B/main/checkpoints/iter_0001000
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.files import write_json

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="Hugging Face folder")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="Megatron checkpoint, or a folder of them (the newest)"
    )
    parser.add_argument("--precision", choices=tuple(TOLERANCE), default="fp32", help="of the computation (fp32)")
    parser.add_argument("--tolerance", type=float, metavar="MEAN", help="largest mean difference that is accepted")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the differences as JSON when they are accepted"
    )


def run(arguments: argparse.Namespace) -> int:
    # imported here: torch, megatron and transformers take seconds to start
    from megatron_cpt.checkpoint.mcore import find_checkpoint
    from megatron_cpt.train.logits import compare_logits

    found = compare_logits(arguments.hf_dir, find_checkpoint(arguments.checkpoint), precision=arguments.precision)
    tolerance = TOLERANCE[arguments.precision] if arguments.tolerance is None else arguments.tolerance
    is_equal = found.mean <= tolerance
    if is_equal and arguments.output:
        write_json(arguments.output, {"format": 1, "tolerance": tolerance, **vars(found)})
    sys.stdout.write(
        f"logits over {found.num_tokens} tokens in {arguments.precision}: largest difference {found.largest:.2e}, "
        f"mean {found.mean:.2e} ({'within' if is_equal else 'ABOVE'} the tolerance {tolerance:g}), "
        f"loss difference {found.loss:.2e} nats, same most likely token at {found.agreement:.2%}\n"
    )
    return 0 if is_equal else 1
