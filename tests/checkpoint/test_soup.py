"""Averages against numpy in float64, what does not match, mergekit's exit codes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.soup import mean, mergekit
from megatron_cpt.checkpoint.soup.mean import average_hf, greedy_soup, uniform_soup, weighted_mean
from megatron_cpt.checkpoint.soup.megatron import average_checkpoints
from megatron_cpt.checkpoint.soup.mergekit import (
    OF_TWO,
    WEIGHTLESS,
    WITHOUT_BASE,
    mergekit_config,
    model_references,
    run_mergekit,
)
from megatron_cpt.checkpoint.torch_dist.mcore import read_tracker, verify_checkpoint, write_tracker
from megatron_cpt.errors import CheckpointError
from tests.checkpoint.conftest import build_hf_model
from tests.tolerances import assert_bf16_rounding, assert_fp32_rounding


@pytest.fixture(scope="session")
def variants(hf_models, tmp_path_factory):
    """Return three folders of one architecture with different bf16 weights."""
    root = tmp_path_factory.mktemp("variants")
    paths = []
    for number in range(3):
        path = root / f"v{number}"
        shutil.copytree(hf_models("llama"), path)
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.randn(values.shape, generator=generator).bfloat16()
            for name, values in load_file(path / "model.safetensors").items()
        }
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "tokenizer.json").write_text("{}")
        paths.append(path)
    return paths


def float64_mean(paths, name, weights):
    """Return the mean in float64, rounded to float32 and then to bf16."""
    total = sum(
        weight * HFFolder(path).read(name).double().numpy() for path, weight in zip(paths, weights, strict=True)
    )
    return torch.from_numpy(np.asarray(total / sum(weights))).bfloat16()


def changed(source, target, **tensors):
    """Copy a folder with some tensors added or replaced; None removes one."""
    shutil.copytree(source, target)
    content = load_file(target / "model.safetensors") | {
        name.replace("__", "."): value for name, value in tensors.items()
    }
    save_file({name: value for name, value in content.items() if value is not None}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("weights", [None, [1, 1, 1], [0.2, 0.3, 0.5]])
def test_the_average_is_numpys_in_float64(variants, tmp_path, weights):
    output = average_hf(variants, tmp_path / "soup", weights=weights)
    folder = HFFolder(output)
    assert len(folder.names()) == len(HFFolder(variants[0]).names())
    for name in folder.names():
        expected = float64_mean(variants, name, weights or [1, 1, 1])
        # with weights that float32 holds exactly only the last rounding is left; others tip a tie now and then
        assert (folder.read(name) != expected).float().mean() < (1e-2 if weights and sum(weights) == 1 else 1e-4)
        # a sum next to a tie is rounded to the other side: two roundings apart
        assert_bf16_rounding(folder.read(name), expected, roundings=4)


def test_the_sum_is_taken_in_float32_and_divided_once():
    values = [torch.randn(10_000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    mean = weighted_mean([lambda value=value: value for value in values], [1, 1, 1])
    assert mean.dtype == torch.float32
    exact = (sum(value.double() for value in values) / 3).float()
    assert_fp32_rounding(mean, exact, roundings=4, of_largest=True)  # two sums, a division, and the exact value's own


def test_the_base_is_one_more_model_and_gives_configuration_and_tokenizer(variants, tmp_path):
    output = average_hf(variants[1:], tmp_path / "soup", base=variants[0])
    name = "model.norm.weight"
    assert torch.equal(HFFolder(output).read(name), float64_mean(variants, name, [1, 1, 1]))
    assert (output / "tokenizer.json").exists() and (output / "generation_config.json").exists()


def test_only_matching_names_are_merged_and_the_others_reported(variants, tmp_path):
    other = changed(
        variants[1],
        tmp_path / "other",
        extra__weight=torch.ones(2),
        model__norm__weight=None,
        lm_head__weight=torch.ones(3, 3),
    )
    with pytest.raises(CheckpointError, match="2 tensors are in some models only.*1 tensors differ in shape"):
        average_hf([variants[0], other], tmp_path / "soup")
    output = average_hf([other], tmp_path / "soup", base=variants[0], allow=["skipped", "mismatched"])
    info = json.loads((output / "merge_info.json").read_text())
    assert sorted(info["skipped"]) == ["extra.weight", "model.norm.weight"] and info["mismatched"] == ["lm_head.weight"]
    assert info["counts"]["matched"] == len(HFFolder(variants[0]).names()) - 2 == len(info["matched"])
    base = HFFolder(variants[0])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(HFFolder(output).read(name), base.read(name))
    assert info["inputs"][0]["files"]["model.safetensors"] != info["inputs"][1]["files"]["model.safetensors"]


def test_other_tokenizers_and_configurations_are_errors_unless_allowed(variants, tmp_path):
    other = changed(variants[1], tmp_path / "other")
    (other / "tokenizer.json").write_text('{"a": 1}')
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match="differs from .* in layernorm_epsilon.*tokenizer:"):
        average_hf([variants[0], other], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    average_hf([variants[0], other], tmp_path / "soup", allow=["configuration", "tokenizer"])


def test_weights_must_fit(variants, tmp_path):
    with pytest.raises(CheckpointError, match="2 weights for 3 models"):
        average_hf(variants, tmp_path / "soup", weights=[1, 2])
    with pytest.raises(CheckpointError, match="sum to 0"):
        average_hf(variants, tmp_path / "soup", weights=[1, -1, 0])


def test_dtype_is_as_asked(variants, tmp_path):
    output = average_hf(variants, tmp_path / "soup", dtype="fp32")
    assert HFFolder(output).dtype("model.norm.weight") == torch.float32
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"


def test_greedy_keeps_what_lowers_the_score(variants, tmp_path):
    def score(path):
        """Distance to the mean of the first two."""
        target = float64_mean(variants[:2], "model.norm.weight", [1, 1]).float()
        return float((HFFolder(path).read("model.norm.weight").float() - target).norm())

    output, steps = greedy_soup([variants[2], variants[0], variants[1]], tmp_path / "soup", score)
    assert sum(step["kept"] for step in steps) == 2 and score(output) < 1e-6
    assert json.loads((output / "merge_info.json").read_text())["greedy_steps"] == steps
    uniform = uniform_soup(variants, tmp_path / "uniform")
    assert score(uniform) > score(output)


@pytest.mark.full
def test_mergekits_linear_merge_equals_ours(variants, tmp_path):
    config = mergekit_config(variants, method="linear")
    assert all(entry["model"].startswith("/") for entry in config["models"])
    output = run_mergekit(config, tmp_path / "merged")
    ours = average_hf(variants, tmp_path / "ours")
    for name in HFFolder(ours).names():
        difference = HFFolder(output).read(name).float() - HFFolder(ours).read(name).float()
        assert (difference != 0).float().mean() < 1e-3
    info = json.loads((output / "merge_info.json").read_text())
    assert info["engine"] == "mergekit" and len(info["inputs"]) == 3 and info["counts"]["skipped"] == 0


def test_a_failing_mergekit_fails_the_soup_and_leaves_nothing(variants, tmp_path, monkeypatch):
    program = tmp_path / "mergekit-yaml"
    program.write_text("#!/bin/sh\ntouch $2/config.json\necho no such method >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(mergekit, "_mergekit", lambda: str(program))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**mergekit_config(variants[:2]), "merge_method": "no-such-method"}))
    with pytest.raises(CheckpointError, match="mergekit-yaml: left with 3: no such method"):
        run_mergekit(recipe, tmp_path / "merged")
    program.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        run_mergekit(recipe, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mergekit-yaml", "recipe.yaml"]


def test_configurations_of_other_methods_name_the_base():
    from pathlib import Path

    slerp = mergekit_config([Path("/b")], method="slerp", base=Path("/a"), parameters={"t": 0.5})
    assert slerp["base_model"] == "/a" and [entry["model"] for entry in slerp["models"]] == ["/a", "/b"]
    assert slerp["parameters"] == {"t": 0.5}
    ties = mergekit_config([Path("/b"), Path("/c")], method="ties", base=Path("/a"), weights=[1, 2])
    assert [entry["parameters"]["weight"] for entry in ties["models"]] == [1, 2] and ties["base_model"] == "/a"


def test_every_method_of_the_installed_mergekit_gets_the_weights_and_the_base_that_it_takes():
    from pathlib import Path

    import mergekit.merge_methods  # noqa: F401  fills the registry
    from mergekit.merge_methods import registry

    methods = registry._METHODS
    takes_weight = {
        name for name, method in methods.items() if "weight" in {p.name for p in method.spec.input_parameters}
    }
    assert set(methods) - takes_weight == WEIGHTLESS
    assert {name for name, m in methods.items() if m.spec.contract.base.value == "ignored"} == WITHOUT_BASE
    assert {name for name, m in methods.items() if m.spec.contract.max_inputs == 2} == OF_TWO
    karcher = mergekit_config([Path("/b"), Path("/c")], method="karcher", base=Path("/a"))
    assert [entry["model"] for entry in karcher["models"]] == ["/a", "/b", "/c"] and "base_model" not in karcher
    nuslerp = mergekit_config([Path("/b"), Path("/c")], method="nuslerp", weights=[1, 3])
    assert [entry["parameters"]["weight"] for entry in nuslerp["models"]] == [1, 3]
    with pytest.raises(CheckpointError, match="model_stock takes no weight"):
        mergekit_config([Path("/b"), Path("/c")], method="model_stock", base=Path("/a"), weights=[1, 2])


@pytest.fixture(scope="session")
def checkpoints(variants, tmp_path_factory):
    """Return the variants as Megatron checkpoints."""
    root = tmp_path_factory.mktemp("megatron")
    return [hf_to_mcore(path, root / path.name) for path in variants]


def test_megatron_checkpoints_average_directly_into_either_format(variants, checkpoints, tmp_path):
    expected = average_hf(variants, tmp_path / "expected", weights=[1, 2, 3])
    exported = average_checkpoints(checkpoints, tmp_path / "hf", weights=[1, 2, 3], to="huggingface")
    release = average_checkpoints(checkpoints, tmp_path / "mcore", weights=[1, 2, 3])
    assert json.loads((exported / "merge_info.json").read_text())["counts"]["skipped"] == 0
    assert verify_checkpoint(release)["source"]["kind"] == "soup" and read_tracker(tmp_path / "mcore") == "release"
    through = mcore_to_hf(release, tmp_path / "through")
    for name in HFFolder(expected).names():
        for folder in (exported, through):
            assert torch.equal(HFFolder(folder).read(name), HFFolder(expected).read(name))


def test_a_soup_never_lands_among_a_runs_checkpoints(checkpoints, tmp_path):
    write_tracker(tmp_path, 100)
    with pytest.raises(CheckpointError, match="holds a run at iteration 100"):
        average_checkpoints(checkpoints, tmp_path)
    assert read_tracker(tmp_path) == 100


def test_checkpoints_of_other_models_do_not_average(checkpoints, hf_models, tmp_path):
    other = hf_to_mcore(hf_models("qwen2"), tmp_path / "qwen2")
    with pytest.raises(CheckpointError, match="add_qkv_bias: False != True"):
        average_checkpoints([checkpoints[0], other], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_the_same_soup_is_kept_and_another_one_under_its_name_is_refused(hf_models, tmp_path):
    models = [hf_models("llama"), tmp_path / "other"]
    build_hf_model("llama", seed=1).save_pretrained(models[1])
    output = average_hf(models, tmp_path / "soup")
    made = (output / "model.safetensors").stat().st_mtime_ns
    assert average_hf(models, output) == output
    assert (output / "model.safetensors").stat().st_mtime_ns == made
    for changed in ({"weights": [1, 2]}, {"dtype": "bf16"}):
        with pytest.raises(CheckpointError, match="made of other models or in another way"):
            average_hf(models, output, **changed)


def mergekit_yaml(path, **settings):
    """Write a mergekit configuration; return its path."""
    path.write_text(yaml.safe_dump({"dtype": "float32", "out_dtype": "float32", **settings}))
    return path


def recorded_weights(output):
    """Return folder name -> weight of a soup's record."""
    info = json.loads((output / "merge_info.json").read_text())
    return {Path(entry["path"]).name: entry["weight"] for entry in info["inputs"]}


@pytest.mark.full
def test_mergekits_gradients_and_filters_run_and_are_recorded_as_they_stand(variants, tmp_path, monkeypatch):
    monkeypatch.chdir(variants[0].parent)
    a, b, c = (path.name for path in variants)  # relative paths, as mergekit takes them
    filters = [{"filter": "mlp", "value": 0.25}, {"value": 0.75}]
    config = mergekit_yaml(
        tmp_path / "merge.yaml",
        merge_method="linear",
        models=[
            {"model": a, "parameters": {"weight": [0.0, 0.5, 1.0]}},
            {"model": {"model": {"path": b}}, "parameters": {"weight": filters}},
            {"model": c, "parameters": {"weight": 1}},
        ],
    )
    output = run_mergekit(config, tmp_path / "out")
    assert recorded_weights(output) == {a: [0.0, 0.5, 1.0], b: filters, c: 1}
    assert "rope_theta" in json.loads((output / "config.json").read_text())


@pytest.mark.slow
def test_a_weight_belongs_to_its_input_where_the_base_is_none_of_the_models(variants, tmp_path):
    base, left, right = variants
    config = mergekit_yaml(
        tmp_path / "merge.yaml",
        merge_method="task_arithmetic",
        base_model=str(base),
        models=[
            {"model": str(left), "parameters": {"weight": 0.25}},
            {"model": str(right), "parameters": {"weight": 0.75}},
        ],
    )
    output = run_mergekit(config, tmp_path / "out")
    assert recorded_weights(output) == {base.name: None, left.name: 0.25, right.name: 0.75}


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"models": [{"model": "A"}, {"model": {"path": "B"}}]}, ["A", "B"]),
        ({"models": [{"model": "A+lora"}, {"model": {"model": "B", "lora": "lora"}}]}, ["A", "B"]),
        ({"base_model": "A", "models": [{"model": "A"}, {"model": "B"}]}, ["A", "B"]),
        ({"slices": [{"sources": [{"model": "A", "layer_range": [0, 1]}, {"model": "B", "layer_range": [0, 1]}]}]}, ["A", "B"]),
        ({"modules": {"text": {"models": [{"model": "B"}, {"model": "A"}]}}}, ["B", "A"]),
        ({"slices": [{"base_model": "A", "sources": [{"model": "B", "layer_range": [0, 2]}]}]}, ["A", "B"]),
    ],
)  # fmt: skip
def test_models_are_found_in_every_form_of_a_configuration(settings, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("A", "B", "lora"):
        (tmp_path / name).mkdir()
    assert [path.name for path in model_references(settings)] == places


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "holds no mapping"),
        ("models: [\n", "cannot be read"),
        ("merge_method: linear\n", "names no models"),
        ("models: [{model: /nowhere}]\n", "/nowhere is no folder here"),
        ("models: [a, b]\n", "is not where mergekit has one"),
    ],
)
def test_a_configuration_that_names_no_models_is_refused_in_one_line(text, message, tmp_path):
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        run_mergekit(tmp_path / "merge.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_models_average_where_one_folder_repeats_the_output_layer(hf_models, tmp_path):
    source = hf_models("llama-tied-llama3")
    tensors = load_file(source / "model.safetensors")
    other = shutil.copytree(source, tmp_path / "other")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, other / "model.safetensors")
    for inputs in ([source, other], [other, source]):
        output = average_hf(inputs, tmp_path / f"mean-{inputs[0].name}")
        assert set(HFFolder(output).names()) == set(tensors)


def test_models_are_compared_by_meaning_and_written_in_both_styles(hf_models, tmp_path):
    source = hf_models("llama-tied-llama3")
    older = shutil.copytree(source, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    config |= {"use_mrope": False, "_attn_implementation_autoset": True}
    (older / "config.json").write_text(json.dumps(config))
    output = average_hf([source, older], tmp_path / "out")
    written = json.loads((output / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"]["rope_type"] == "llama3"
    (older / "config.json").write_text(json.dumps({**config, "rope_theta": 1e4}))
    with pytest.raises(CheckpointError, match="rotary_base: 500000.0 != 10000.0"):
        average_hf([source, older], tmp_path / "refused")


def test_an_export_that_changed_since_is_hashed_and_one_that_did_not_is_not(hf_models, tmp_path, monkeypatch):
    exported = mcore_to_hf(hf_to_mcore(hf_models("llama"), tmp_path / "mcore"), tmp_path / "hf")
    recorded = json.loads((exported / "conversion.json").read_text())["files"]["model.safetensors"]["hash"]
    weights = [exported / "model.safetensors"]
    monkeypatch.setattr(mean, "content_hash", lambda path: "read")
    assert mean.recorded_hashes(exported, weights) == {"model.safetensors": recorded}
    weights[0].touch()
    assert mean.recorded_hashes(exported, weights) == {"model.safetensors": "read"}
