"""Every params file loads with the task template and has the size that its name says."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.config.settings.derived import world_size
from megatron_cpt.launch.planning.memory import stage_memories
from megatron_cpt.launch.planning.model_size import num_active_parameters, num_parameters
from megatron_cpt.launch.planning.plan import GIB, GPU_RESERVE_BYTES
from tests.tolerances import assert_about

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))
VARIANTS = sorted(yaml.safe_load((ROOT / "tasks/template/task.yaml").read_text())["variants"])

# Model cards: parameters of the Hugging Face models, embeddings and output layer included.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama3-1b": 1_235_814_400,
    "llama3-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llm-jp-8b": 8_590_200_832,
    "llm-jp-moe-32b-a3.8b": 32_139_028_992,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
}


# Model cards that count without embeddings: theirs have the tokenizer's rows, the models padded ones.
NON_EMBEDDING = {
    "llm-jp-13b": 12_688_184_320,
    "llm-jp-moe-8x1.8b": 8_858_863_616,
    "llm-jp-moe-32b-a3.8b": 31_635_712_512 - 196_608 * 2560,  # its card counts the output layer in
}
ACTIVE = {"llm-jp-moe-32b-a3.8b": 3_827_476_992}


def run(name: str):
    return load_config(ROOT / "tasks/template", str(ROOT / f"params/{name}.yaml"), "50B").config


def model(name: str):
    return run(name).model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_each_params_file_loads_with_each_variant_of_the_template(name: str, variant: str) -> None:
    config = load_config(ROOT / "tasks/template", str(ROOT / f"params/{name}.yaml"), "50B", variant).config
    assert config.params == name and config.training.train_tokens == 50 * 10**9


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    assert num_parameters(model(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", NON_EMBEDDING)
def test_published_models_have_their_parameters_without_embeddings(name: str) -> None:
    shape = model(name)
    embeddings = (2 if shape.untie_embeddings_and_output_weights else 1) * shape.vocab_size * shape.hidden_size
    assert num_parameters(shape) - embeddings == NON_EMBEDDING[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_published_models_have_their_active_parameters(name: str) -> None:
    assert num_active_parameters(model(name)) == ACTIVE[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_default_layout_fits_nodes_of_eight_gpus_with_80_gb(name: str) -> None:
    config = run(name)
    assert name.startswith("demo") or world_size(config) % 8 == 0
    peak = max(stage.total for stage in stage_memories(config))
    assert peak + GPU_RESERVE_BYTES <= 80 * GIB, f"{peak / GIB:.1f} GiB"


@pytest.mark.parametrize("name", [name for name in NAMES if not re.search(r"\dx\d", name)])
def test_the_size_in_a_name_is_the_size_of_the_model(name: str) -> None:
    sizes = re.findall(r"(\d+(?:\.\d+)?)([mb])", name)
    total = float(sizes[0][0]) * {"m": 1e6, "b": 1e9}[sizes[0][1]]
    assert_about(num_parameters(model(name)), total, within=0.25, why="a name is rounded, with or without embeddings")
    if len(sizes) == 2:
        active = num_active_parameters(model(name))
        assert_about(active, float(sizes[1][0]) * 1e9, within=0.25, why="a name is rounded, with or without embeddings")


def test_a_params_file_says_what_it_is() -> None:
    for name in NAMES:
        assert yaml.safe_load((ROOT / f"params/{name}.yaml").read_text())["description"], name
