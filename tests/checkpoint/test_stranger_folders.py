"""Folders as strangers bring them: leftovers, options, other formats, everything beside the weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint.convert.choices import ExportChoices, ImportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.convert.verify import compare_weights
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.quantized import fp8_values, mxfp4_values
from megatron_cpt.checkpoint.soup.mean import average_hf
from megatron_cpt.checkpoint.soup.megatron import average_checkpoints
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.copying import copy_checkpoint
from megatron_cpt.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
NORM = "model.norm.weight"


def folder_of(source, target, tensors=None, remove=(), **changes):
    """Copy a folder with changed tensors and keys of config.json."""
    shutil.copytree(source, target)
    config = {**json.loads((target / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in remove}))
    if tensors is not None:
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def weights_of(source):
    """Return the tensors of a folder of one file."""
    return load_file(source / "model.safetensors")


# options


def test_options_of_an_import_are_honoured_by_every_inverse(hf_models, tmp_path):
    tensors = weights_of(hf_models("llama")) | {"extra.weight": torch.ones(2)}
    source = folder_of(hf_models("llama"), tmp_path / "source", tensors, odd_key=3)
    with pytest.raises(CheckpointError, match="key odd_key"):
        hf_to_mcore(source, tmp_path / "none")
    release = hf_to_mcore(
        source, tmp_path / "mcore", options=ImportChoices(ignore_config=["odd_key"], skip_tensors=["extra.*"])
    )
    assert mcore.read_manifest(release)["options"] == {"ignore_config": ["odd_key"], "skip_tensors": ["extra.*"]}
    assert NORM in compare_weights(source, release)
    exported = mcore_to_hf(release, tmp_path / "hf")
    assert json.loads((exported / "config.json").read_text())["odd_key"] == 3
    assert NORM in compare_weights(exported, release)
    again = hf_to_mcore(exported, tmp_path / "again")
    assert mcore.read_manifest(again)["options"]["ignore_config"] == ["odd_key"]
    mean = average_checkpoints([release, again], tmp_path / "mean")
    assert json.loads((mcore_to_hf(mean, tmp_path / "hf2") / "config.json").read_text())["odd_key"] == 3
    average_hf([exported, exported], tmp_path / "soup")


# which files


def sharded(source, target, names):
    """Copy a folder with its tensors split into files of these names, in the order of the tensors, without an index."""
    tensors = weights_of(source)
    target.mkdir()
    shutil.copy(source / "config.json", target)
    where = {}
    for number, (tensor, values) in enumerate(sorted(tensors.items())):
        where.setdefault(names[number % len(names)], {})[tensor] = values
    for name, part in where.items():
        save_file(part, target / name, {"format": "pt"})
    return target, {tensor: name for name, part in where.items() for tensor in part}


def write_index(folder, named):
    """Write the index of a folder."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_the_index_decides_between_a_named_and_a_left_over_shard(hf_models, tmp_path):
    folder, named = sharded(hf_models("llama"), tmp_path / "folder", SHARDS)
    write_index(folder, named)
    save_file({NORM: torch.full((32,), 7.0)}, folder / "model-00003-of-00003.safetensors")
    stale = load_file(folder / named["lm_head.weight"]) | {NORM: torch.full((32,), 7.0)}
    if named["lm_head.weight"] != named[NORM]:
        save_file(stale, folder / named["lm_head.weight"])  # in a file that is read, but not for this tensor
    for variant in ("model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "consolidated.safetensors"):
        save_file({NORM: torch.full((32,), 9.0)}, folder / variant)
    assert torch.equal(HFFolder(folder).read(NORM), weights_of(hf_models("llama"))[NORM])


def test_a_tensor_twice_without_an_index_is_an_error_and_a_variant_is_not_mixed_in(hf_models, tmp_path):
    folder, _ = sharded(hf_models("llama"), tmp_path / "folder", SHARDS)
    save_file({NORM: torch.full((32,), 9.0)}, folder / "model.fp16-00001-of-00002.safetensors")
    assert torch.equal(HFFolder(folder).read(NORM), weights_of(hf_models("llama"))[NORM])
    save_file({NORM: torch.full((32,), 7.0)}, folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="norm.weight is in two files"):
        HFFolder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, named: (folder / SHARDS[1]).unlink(), "are in no file"),
        (lambda folder, named: write_index(folder, {**named, "ghost": SHARDS[0]}), "the first is ghost"),
        (lambda folder, named: write_index(folder, {**named, "x": "../x.safetensors"}), "names '../x.safetensors'"),
        (lambda folder, named: (folder / "model.safetensors.index.json").write_text("[]"), "no weight_map"),
        (lambda folder, named: (folder / "model.safetensors.index.json").write_text("{"), "index.json"),
        (lambda folder, named: save_file({"a": torch.ones(1)}, folder / "model.safetensors"), "which does not name it"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused_by_its_reason(change, message, hf_models, tmp_path):
    folder, named = sharded(hf_models("llama"), tmp_path / "folder", SHARDS)
    write_index(folder, named)
    change(folder, named)
    with pytest.raises(CheckpointError, match=message):
        HFFolder(folder)


# configurations


@pytest.mark.parametrize("names", [None, [], ["LlamaModel", "LlamaForCausalLM"], "LlamaForCausalLM"])
def test_an_architecture_is_known_by_its_model_type_both_ways(names, hf_models, tmp_path):
    source = folder_of(hf_models("llama"), tmp_path / "source", architectures=names)
    exported = mcore_to_hf(hf_to_mcore(source, tmp_path / "mcore"), tmp_path / "hf")
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_kimi_k2_opens_without_remote_code(hf_models, tmp_path):
    from transformers import AutoModelForCausalLM

    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    source = folder_of(hf_models("deepseek-v3"), tmp_path / "source", model_type="kimi_k2", auto_map=code)
    (source / "configuration_deepseek.py").write_text("raise SystemExit('remote code was run')\n")
    exported = mcore_to_hf(hf_to_mcore(source, tmp_path / "mcore"), tmp_path / "hf")
    written = json.loads((exported / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3" and "auto_map" not in written
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
    assert torch.equal(model.model.norm.weight.data, weights_of(hf_models("deepseek-v3"))[NORM])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'. A whole number from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0. A whole number from 1"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'. A number"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'. A dictionary or null"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "must mean the same"),
        ({"rope_theta": 3.0}, "rope_theta is 3.0 and 500000.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'. True or false"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"quantization_config": "fp8"}, "quantization_config is fp8"),
    ],
)
def test_an_odd_value_is_named_in_one_line(changes, message, hf_models, tmp_path):
    source = folder_of(hf_models("llama"), tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_to_mcore(source, tmp_path / "mcore")
    assert "\n" not in str(caught.value) and "source/config.json" in str(caught.value)


def test_a_configuration_that_is_no_object_is_named(hf_models, tmp_path):
    source = folder_of(hf_models("llama"), tmp_path / "source")
    (source / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json: holds no JSON object"):
        hf_to_mcore(source, tmp_path / "mcore")


# weights in few bits


def test_fp8_blocks_are_dequantised_as_transformers_does():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    stored = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.01
    theirs = Fp8Dequantize(None)._dequantize_one(stored, scales, torch.bfloat16)
    assert torch.equal(fp8_values(stored, scales, (128, 128), torch.bfloat16), theirs)
    # 576 rows (kv_a_proj_with_mqa of DeepSeek-V3) are 4.5 blocks: the last scale is that of 64 rows
    odd, five = torch.randn(576, 128).to(torch.float8_e4m3fn), torch.rand(5, 1) + 0.01
    values = fp8_values(odd, five, (128, 128), torch.float32)
    for block in range(5):
        rows = slice(128 * block, 128 * (block + 1))
        assert torch.equal(values[rows], odd[rows].float() * five[block])


def test_mxfp4_is_dequantised_as_transformers_does():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(mxfp4_values(blocks, scales, torch.bfloat16), theirs)


def quantised(tensors, block):
    """Return tensors with every matrix of the layers in float8, and the scales of its blocks."""
    result = {}
    for name, values in tensors.items():
        if ".layers." not in name or values.ndim != 2 or "gate.weight" in name:
            result[name] = values
            continue
        rows, columns = (-(-size // block) for size in values.shape)
        result[name] = (values * 8).to(torch.float8_e4m3fn)
        result[name + "_scale_inv"] = torch.rand(rows, columns) + 0.05
    return result


def test_an_fp8_base_trains_and_exports_in_bf16(hf_models, tmp_path):
    tensors = quantised(weights_of(hf_models("deepseek-v3")), 16)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    source = folder_of(
        hf_models("deepseek-v3"), tmp_path / "source", tensors, quantization_config=settings, dtype="bfloat16"
    )
    release = hf_to_mcore(source, tmp_path / "mcore", options=ImportChoices(dtype="bf16"), verify=True)
    exported = mcore_to_hf(release, tmp_path / "hf")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    expected = fp8_values(tensors[name], tensors[name + "_scale_inv"], (16, 16), torch.bfloat16)
    assert torch.equal(HFFolder(exported).read(name), expected)
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    assert not any(name.endswith("_scale_inv") for name in HFFolder(exported).names())


@pytest.mark.parametrize("with_settings", [True, False])
def test_float8_without_a_scale_is_never_imported(with_settings, hf_models, tmp_path):
    tensors = weights_of(hf_models("llama"))
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}} if with_settings else {}
    source = folder_of(hf_models("llama"), tmp_path / "source", tensors, **settings)
    with pytest.raises(CheckpointError, match="down_proj.weight is float8 without a scale"):
        hf_to_mcore(source, tmp_path / "mcore", options=ImportChoices(dtype="bf16"))
    assert not (tmp_path / "mcore" / "release").exists()


# values and types


def test_what_a_narrower_type_makes_infinite_and_nan_are_named_and_pass_when_allowed(hf_models, tmp_path):
    tensors = weights_of(hf_models("llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 0] = 70000.0
    source = folder_of(hf_models("llama"), tmp_path / "source", tensors)
    hf_to_mcore(source, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"down_proj.weight has 0 NaN and 1 infinite values as float16"):
        hf_to_mcore(source, tmp_path / "half", options=ImportChoices(dtype="fp16"))
    release = hf_to_mcore(source, tmp_path / "allowed", options=ImportChoices(dtype="fp16", allow_nonfinite=True))
    with pytest.raises(CheckpointError, match="1 infinite"):
        mcore_to_hf(release, tmp_path / "hf")
    tensors[name][0, 0] = float("nan")
    broken = folder_of(hf_models("llama"), tmp_path / "nan", tensors)
    with pytest.raises(CheckpointError, match="has 1 NaN and 0 infinite"):
        hf_to_mcore(broken, tmp_path / "none")


def test_mixed_types_in_one_projection_convert_with_a_type_and_are_named_without(hf_models, tmp_path):
    tensors = weights_of(hf_models("llama"))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    source = folder_of(hf_models("llama"), tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match="q_proj.weight bfloat16, .*k_proj.weight float32.*--dtype"):
        hf_to_mcore(source, tmp_path / "none")
    exported = mcore_to_hf(
        hf_to_mcore(source, tmp_path / "mcore", options=ImportChoices(dtype="bf16"), verify=True), tmp_path / "hf"
    )
    assert torch.equal(HFFolder(exported).read(name), tensors[name])


def test_layers_that_predict_further_tokens_are_dropped_by_choice(hf_models, tmp_path):
    tensors = weights_of(hf_models("deepseek-v3"))
    further = {
        "model.layers.2.eh_proj.weight": torch.ones(2, 2),
        "model.layers.2.embed_tokens.weight": torch.ones(2, 2),
    }
    source = folder_of(hf_models("deepseek-v3"), tmp_path / "source", tensors | further, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match="1 layers behind the last predict further tokens .*--drop-mtp"):
        hf_to_mcore(source, tmp_path / "none")
    exported = mcore_to_hf(
        hf_to_mcore(source, tmp_path / "mcore", options=ImportChoices(drop_mtp=True)), tmp_path / "hf"
    )
    assert json.loads((exported / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert set(HFFolder(exported).names()) == set(tensors)


# beside the weights

BESIDE = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "spiece.model": "sp",
    "qwen.tiktoken": "t",
    "special_tokens_map.json": "{}",
    "generation_config.json": '{"temperature": 0.6, "top_p": 0.95}',
    "chat_template.jinja": "c",
    "additional_chat_templates/tool_use.jinja": "x",
    "LICENSE": "licence",
    "README.md": "card",
    "tokenization_kimi.py": "pass\n",
    "preprocessor_config.json": "{}",
}


def with_everything(source, target):
    """Copy a folder with all kinds of files beside its weights, and some that are weights in other formats."""
    folder_of(source, target)
    for name, text in {**BESIDE, "model.onnx": "w", "original.gguf": "w", ".gitattributes": "g"}.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(text)
    return target


def test_everything_but_weights_travels_and_the_checkpoint_keeps_it(hf_models, tmp_path):
    source = with_everything(hf_models("llama"), tmp_path / "source")
    release = hf_to_mcore(source, tmp_path / "mcore")
    shutil.rmtree(source)  # years later
    copied = copy_checkpoint(release, tmp_path / "archive")
    exported = mcore_to_hf(copied, tmp_path / "hf")
    for name, text in BESIDE.items():
        assert (exported / name).read_text() == text
    assert not any((exported / name).exists() for name in ("model.onnx", "original.gguf", ".gitattributes"))


def test_a_tokenizer_of_its_own_takes_the_place_of_the_kept_one(hf_models, tmp_path):
    release = hf_to_mcore(with_everything(hf_models("llama"), tmp_path / "source"), tmp_path / "mcore")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"mine": 1}')
    (tokenizer / "tokenizer_config.json").write_text("{}")
    exported = mcore_to_hf(release, tmp_path / "hf", options=ExportChoices(tokenizer=tokenizer))
    assert (exported / "tokenizer.json").read_text() == '{"mine": 1}'
    assert not (exported / "spiece.model").exists() and not (exported / "chat_template.jinja").exists()
    assert (exported / "LICENSE").exists() and "0.6" in (exported / "generation_config.json").read_text()


def test_the_base_models_card_has_another_name_beside_a_trained_model(hf_models, tmp_path):
    release = hf_to_mcore(with_everything(hf_models("llama"), tmp_path / "source"), tmp_path / "mcore")
    manifest = mcore.read_manifest(release)
    mcore.write_manifest(release, {**manifest, "iteration": 10})
    exported = mcore_to_hf(release, tmp_path / "hf")
    assert (exported / "BASE_MODEL_CARD.md").read_text() == "card" and not (exported / "README.md").exists()


def test_an_export_without_a_tokenizer_says_so(hf_models, tmp_path, caplog):
    mcore_to_hf(hf_to_mcore(hf_models("llama"), tmp_path / "mcore"), tmp_path / "hf")
    assert "WITHOUT A TOKENIZER" in caplog.text


def test_the_command_line_says_an_error_in_one_line_and_leaves_with_2(hf_models, tmp_path):
    source = folder_of(hf_models("llama"), tmp_path / "source", hidden_size=None)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_cpt", "convert", "hf-to-mcore", str(source), str(tmp_path / "mcore")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hidden_size is None" in done.stderr


def test_a_model_trained_with_another_tokenizer_leaves_its_bases_out(hf_models, tmp_path, caplog):
    from tokenizers import Tokenizer, models

    source = with_everything(hf_models("llama"), tmp_path / "source")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(source / "tokenizer.json"))
    release = hf_to_mcore(source, tmp_path / "mcore")
    manifest = mcore.read_manifest(release)
    mcore.write_manifest(release, {**manifest, "tokenizer": {"name": "mine", "hash": "other", "eod_id": 0}})
    exported = mcore_to_hf(release, tmp_path / "hf")
    assert "trained with tokenizer mine" in caplog.text and "WITHOUT A TOKENIZER" in caplog.text
    assert (exported / "LICENSE").exists() and not (exported / "tokenizer.json").exists()


def test_a_base_whose_tokenizer_has_an_id_too_many_goes_out_as_it_came_in(hf_models, tmp_path, caplog):
    from tokenizers import Tokenizer, models

    source = with_everything(hf_models("llama"), tmp_path / "source")
    Tokenizer(models.WordLevel({"a": 0, "[PAD]": 130}, unk_token="a")).save(str(source / "tokenizer.json"))
    exported = mcore_to_hf(hf_to_mcore(source, tmp_path / "mcore"), tmp_path / "hf")
    assert (exported / "tokenizer.json").exists() and "ids up to 130" in caplog.text


@pytest.mark.parametrize("of_root", [True, False])
def test_a_checkpoint_of_megatron_lm_is_told_the_verb_that_reads_it(of_root, hf_models, tmp_path):
    release = hf_to_mcore(hf_models("llama"), tmp_path / "mcore")
    (release / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="convert foreign-to-hf") as caught:
        mcore_to_hf(tmp_path / "mcore" if of_root else release, tmp_path / "hf")
    assert "remove the folder" not in str(caught.value)
