"""Hugging Face -> Megatron -> Hugging Face, bit for bit, whole or not at all."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint.convert.choices import ExportChoices, ImportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.convert.verify import compare_weights
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.read_config import model_config_from_hf
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError, CptError


def assert_same_tensors(left, right):
    """Compare two Hugging Face folders bit by bit."""
    first, second = HFFolder(left), HFFolder(right)
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        assert first.dtype(name) == second.dtype(name)
        assert torch.equal(first.read(name), second.read(name)), name


def forget_source(checkpoint):
    """Rewrite a converted checkpoint's manifest as that of a model trained from a params file."""
    manifest = mcore.read_manifest(checkpoint)
    manifest |= {"hf": None, "tokenizer": {"name": "t", "eod_id": 2}}
    mcore.write_manifest(checkpoint, manifest)


def with_tensors(source, target, change):
    """Copy a Hugging Face folder, its tensors changed by `change(dict)`."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def with_config(source, target, **changes):
    """Copy a Hugging Face folder with other values in config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_round_trip_is_bit_exact(architecture, hf_models, tmp_path):
    source = hf_models(architecture)
    release = hf_to_mcore(source, tmp_path / "mcore", verify=True)
    assert mcore.read_tracker(tmp_path / "mcore") == "release"
    mcore.verify_checkpoint(release, "full")
    exported = mcore_to_hf(release, tmp_path / "hf", verify=True)
    assert_same_tensors(source, exported)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, exported))
    if "num_nextn_predict_layers" in before:
        before["num_nextn_predict_layers"] = 0  # the folder has none of their tensors
    assert before.items() <= after.items()
    hashes = [json.loads((path / "conversion.json").read_text())["tensors"] for path in (release, exported)]
    assert hashes[0] == hashes[1] and set(hashes[0]) == set(HFFolder(source).names())
    assert compare_weights(source, release) == hashes[0]


def test_an_export_without_the_source_configuration_computes_the_same(architecture, hf_models, tmp_path):
    from transformers import AutoModelForCausalLM

    source = hf_models(architecture)
    release = hf_to_mcore(source, tmp_path / "mcore")
    forget_source(release)
    exported = mcore_to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 2
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (source, exported)]
    assert torch.equal(logits[0], logits[1])


def test_vocabulary_padding_is_added_as_zero_rows_and_removed_again(hf_models, tmp_path):
    source = hf_models("llama")
    for multiple, rows in ((1, 130), (128, 256)):
        release = hf_to_mcore(
            source, tmp_path / str(multiple), options=ImportChoices(make_vocab_size_divisible_by=multiple)
        )
        embedding = DcpReader(release).read("embedding.word_embeddings.weight")
        assert embedding.shape[0] == rows
        assert not embedding[130:].any()
        assert_same_tensors(source, mcore_to_hf(release, tmp_path / f"hf{multiple}"))


def test_dtype_is_as_asked_and_the_configuration_says_so(hf_models, tmp_path):
    source = hf_models("deepseek-v3")
    release = hf_to_mcore(source, tmp_path / "bf16", options=ImportChoices(dtype="bf16"), verify=True)
    reader = DcpReader(release)
    assert reader.dtype("decoder.layers.1.mlp.router.expert_bias") == torch.float32
    exported = mcore_to_hf(release, tmp_path / "hf", verify=True)
    assert HFFolder(exported).dtype("model.norm.weight") == torch.bfloat16
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    back = mcore_to_hf(release, tmp_path / "fp32", options=ExportChoices(dtype="fp32"), verify=True)
    assert HFFolder(back).dtype("model.norm.weight") == torch.float32
    norm = HFFolder(source).read("model.norm.weight")
    assert torch.equal(HFFolder(back).read("model.norm.weight"), norm.bfloat16().float())


def test_large_models_come_in_shards_with_an_index_that_transformers_reads(hf_models, tmp_path):
    from transformers import AutoModelForCausalLM

    release = hf_to_mcore(hf_models("mixtral"), tmp_path / "mcore")
    exported = mcore_to_hf(release, tmp_path / "hf", options=ExportChoices(max_shard_bytes=40_000))
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 3
    assert_same_tensors(hf_models("mixtral"), exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.equal(model.model.norm.weight.data, HFFolder(exported).read("model.norm.weight"))
    sorted(exported.glob("model-*"))[0].unlink()
    with pytest.raises(CheckpointError, match="are in no file"):
        HFFolder(exported)


def test_an_unclaimed_tensor_is_an_error_unless_left_out_by_name(hf_models, tmp_path):
    extra = with_tensors(hf_models("llama"), tmp_path / "extra", lambda tensors: tensors.update(extra=torch.ones(2)))
    with pytest.raises(CheckpointError, match="1 tensors have no place in Megatron's model, the first are extra"):
        hf_to_mcore(extra, tmp_path / "mcore")
    assert not (tmp_path / "mcore").exists()
    release = hf_to_mcore(extra, tmp_path / "mcore", options=ImportChoices(skip_tensors=["ext*"]))
    assert mcore.read_manifest(release)["source"]["skipped"] == ["extra"]


def test_a_missing_tensor_and_a_wrong_shape_are_errors(hf_models, tmp_path):
    less = with_tensors(hf_models("llama"), tmp_path / "less", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="1 tensors are missing, the first are model.norm.weight"):
        hf_to_mcore(less, tmp_path / "mcore")
    other = with_config(hf_models("llama"), tmp_path / "other", intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is \[48, 32\]. config.json says \[40, 32\]"):
        hf_to_mcore(other, tmp_path / "mcore")


def test_a_params_file_of_another_model_is_refused(hf_models, tmp_path):
    source = hf_models("llama")
    model = model_config_from_hf(json.loads((source / "config.json").read_text()))
    hf_to_mcore(source, tmp_path / "same", model=model)
    other = type(model)(**{**vars(model), "num_query_groups": 4})
    with pytest.raises(CheckpointError, match="num_query_groups: 4 != 2"):
        hf_to_mcore(source, tmp_path / "other", model=other)


def test_tied_embeddings_with_an_equal_output_layer_convert_and_with_another_one_do_not(hf_models, tmp_path):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    source = hf_models("llama-tied-llama3")
    release = hf_to_mcore(with_tensors(source, tmp_path / "equal", repeat), tmp_path / "mcore")
    assert "output_layer.weight" not in DcpReader(release).tensor_keys()
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true but"):
        hf_to_mcore(with_tensors(source, tmp_path / "other", change), tmp_path / "mcore2")


def test_a_second_conversion_of_the_same_weights_says_done_and_of_others_is_refused(hf_models, tmp_path, caplog):
    caplog.set_level("INFO")
    source = hf_models("llama")
    release = hf_to_mcore(source, tmp_path / "mcore")
    written = (release / "manifest.json").stat().st_mtime_ns
    (tmp_path / "mcore" / mcore.TRACKER).unlink()
    assert hf_to_mcore(source, tmp_path / "mcore") == release
    assert mcore.read_tracker(tmp_path / "mcore") == "release"
    assert "converted already" in caplog.text and (release / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match="exists already"):
        hf_to_mcore(hf_models("qwen2"), tmp_path / "mcore")
    exported = mcore_to_hf(release, tmp_path / "hf")
    assert mcore_to_hf(release, tmp_path / "hf") == exported
    with pytest.raises(CheckpointError, match="exists already"):
        mcore_to_hf(release, tmp_path / "hf", options=ExportChoices(dtype="bf16"))
    (exported / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="exists already and is damaged"):
        mcore_to_hf(release, tmp_path / "hf")


def test_a_conversion_never_lands_among_a_runs_checkpoints(hf_models, tmp_path):
    mcore.write_tracker(tmp_path, 100)
    with pytest.raises(CheckpointError, match="holds a run at iteration 100"):
        hf_to_mcore(hf_models("llama"), tmp_path)
    assert mcore.read_tracker(tmp_path) == 100


def test_a_failure_in_a_worker_fails_the_conversion_and_leaves_nothing(hf_models, tmp_path, monkeypatch):
    original = HFFolder.read

    def read(folder, name):
        if name == "model.layers.1.mlp.down_proj.weight":
            raise CheckpointError("disk on fire")
        return original(folder, name)

    monkeypatch.setattr(HFFolder, "read", read)
    with pytest.raises(CptError, match="disk on fire"):
        hf_to_mcore(hf_models("llama"), tmp_path / "mcore")
    assert [path.name for path in (tmp_path / "mcore").iterdir() if not path.name.startswith(".writer")] == []


def test_a_damaged_checkpoint_is_not_exported(hf_models, tmp_path):
    release = hf_to_mcore(hf_models("llama"), tmp_path / "mcore")
    part = next(release.glob("*.distcp"))
    with part.open("r+b") as file:
        file.truncate(part.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="distcp has"):
        mcore_to_hf(release, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_wrong_conversion_is_found_by_verify(hf_models, tmp_path, monkeypatch):
    from megatron_cpt.checkpoint.mapping import kinds

    monkeypatch.setattr(kinds, "merge_gate_up", lambda gate, up: torch.cat((up, gate)))
    with pytest.raises(CheckpointError, match="gate_proj.weight: differs"):
        hf_to_mcore(hf_models("llama"), tmp_path / "mcore", verify=True)
    assert not (tmp_path / "mcore" / "release").exists()


def test_tokenizer_files_chat_template_and_generation_configuration_come_along(hf_models, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for name in names:
        (tokenizer / name).write_text("{}")
    (tokenizer / "notes.txt").write_text("")
    release = hf_to_mcore(hf_models("llama"), tmp_path / "mcore")
    exported = mcore_to_hf(release, tmp_path / "hf", options=ExportChoices(tokenizer=tokenizer))
    assert {path.name for path in exported.iterdir()} == {*names, "config.json", "model.safetensors", "conversion.json"}
    single = mcore_to_hf(release, tmp_path / "single", options=ExportChoices(tokenizer=tokenizer / "tokenizer.json"))
    assert json.loads((single / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    with pytest.raises(CheckpointError, match="no such tokenizer"):
        mcore_to_hf(release, tmp_path / "none", options=ExportChoices(tokenizer=tmp_path / "nowhere"))


def test_a_remote_code_folder_of_a_known_architecture_converts_both_ways_and_keeps_its_code(hf_models, tmp_path):
    """OpenSeek-Small-v1 is such a folder: DeepseekV3ForCausalLM with configuration and modelling files beside it."""
    source = shutil.copytree(hf_models("deepseek-v3"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    classes = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModelForCausalLM": "modeling_deepseek.D"}
    extra = {"auto_map": classes, "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1}
    (source / "config.json").write_text(json.dumps({**config, **extra}))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (source / name).write_text("raise SystemExit('remote code was run')\n")
    release = hf_to_mcore(source, tmp_path / "mcore", verify=True)
    output = mcore_to_hf(release, tmp_path / "hf", options=ExportChoices(tokenizer=source), verify=True)
    assert json.loads((output / "config.json").read_text())["auto_map"] == classes
    assert (output / "modeling_deepseek.py").read_text() == (source / "modeling_deepseek.py").read_text()
    left, right = HFFolder(source), HFFolder(output)
    assert all(torch.equal(left.read(name), right.read(name)) for name in left.names())


def test_pickled_weight_files_are_read_without_running_code(hf_models, tmp_path):
    source = hf_models("llama")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(source / "config.json", pickled)
    torch.save(load_file(source / "model.safetensors"), pickled / "pytorch_model.bin")
    assert_same_tensors(source, mcore_to_hf(hf_to_mcore(pickled, tmp_path / "mcore"), tmp_path / "hf"))


def test_a_description_that_leaves_defaults_open_is_the_same_model(hf_models, architecture, tmp_path):
    source = hf_models(architecture)
    release = hf_to_mcore(source, tmp_path / "mcore")
    made = (release / "manifest.json").stat().st_mtime_ns
    stated = ModelConfig(**json.loads((release / "manifest.json").read_text())["model"])
    open_ones = {"hidden_dropout": 0.1, "init_method_std": 0.5}
    if stated.kv_channels == stated.hidden_size // stated.num_attention_heads:
        open_ones["kv_channels"] = None
    if stated.num_query_groups == stated.num_attention_heads:
        open_ones["num_query_groups"] = None
    assert hf_to_mcore(source, tmp_path / "mcore", model=dataclasses.replace(stated, **open_ones)) == release
    assert (release / "manifest.json").stat().st_mtime_ns == made, "kept, not made again"
    with pytest.raises(CheckpointError, match=r"made of something else .*\(padded vocabulary: 256 != 132\)"):
        hf_to_mcore(source, tmp_path / "mcore", options=ImportChoices(make_vocab_size_divisible_by=4))
    with pytest.raises(CheckpointError, match=r"made of something else .*\(dtype of the source\)"):
        hf_to_mcore(source, tmp_path / "mcore", options=ImportChoices(dtype="bf16"))
