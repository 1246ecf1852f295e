"""Write a Hugging Face model with random weights in the shape that a run's settings say: the demo's untrained base.

    python tasks/demo/make_base.py TASK_DIR PARAMS SIZE VARIANT OUTPUT_DIR

The model carries the run's tokenizer. The weights follow from the run's seed alone.
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.checkpoint.convert.run_export import tokenizer_path
from megatron_cpt.checkpoint.huggingface.write_config import hf_config_from_model
from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.files import whole_dir


def main() -> None:
    """Build the model and save it with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task_dir", type=Path)
    parser.add_argument("params")
    parser.add_argument("size")
    parser.add_argument("variant")
    parser.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    config = load_config(arguments.task_dir, arguments.params, arguments.size, arguments.variant).config
    tokenizer_folder = tokenizer_path(config)
    if tokenizer_folder is None:
        parser.error("data.tokenizer is not set")

    # imported here: they take seconds to start, which a wrong argument need not wait for
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    eod_id = load_tokenizer(tokenizer_folder).eod_id
    settings = hf_config_from_model(config.model, dtype="float32", token_ids={"eos_token_id": eod_id})
    settings["bos_token_id"] = None  # the tokenizer has none; transformers would write 1
    torch.manual_seed(config.training.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    with whole_dir(arguments.output_dir) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{arguments.output_dir}: {settings['architectures'][0]}, {parameters:,} parameters\n")


if __name__ == "__main__":
    main()
