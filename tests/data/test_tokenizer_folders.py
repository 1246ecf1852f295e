"""A tokenizer's folder is read as transformers' AutoTokenizer reads it, or refused with the way out."""

import base64
import json
import os
import shutil
import sys

import pytest

from megatron_cpt.data.tokenizer import transformers_reading as reading
from megatron_cpt.data.tokenizer.interface import check_reading, load_tokenizer, same_tokenizer, token_id
from megatron_cpt.errors import DataError
from tests.data.conftest import SENTENCES, build_bpe, save_tokenizer

TEXTS = [
    *SENTENCES,
    "a<new>b <new> c",
    "text <|end_of_text|> more",
    " leading  and trailing ",
    "<extra>x<pad>",
    "日本<new>語",
    "",
]
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    import transformers  # noqa: F401  asked in this process then, which takes milliseconds


def bpe_folder(folder, config=None, **files):
    save_tokenizer(build_bpe(), folder)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def token(content, special=True, **others):
    return {"content": content, "special": special, **PLAIN, **others}


def only_the_json(folder, _):
    return bpe_folder(folder)


def added_in_the_configuration(folder, _):
    decoder = {"0": token("<|end_of_text|>"), "500": token("<new>", special=False)}
    return bpe_folder(folder, {"eos_token": "<|end_of_text|>", "added_tokens_decoder": decoder})


def added_with_spaces_that_belong_to_it(folder, _):
    decoder = {"500": token("<new>", lstrip=True, rstrip=True)}
    return bpe_folder(folder, {"eos_token": "<|end_of_text|>", "added_tokens_decoder": decoder})


def added_in_a_file(folder, _):
    return bpe_folder(folder, added_tokens={"<new>": 500, "<extra>": 501})


def added_in_a_file_that_transformers_passes_over(folder, _):
    decoder = {"0": token("<|end_of_text|>")}
    config = {"eos_token": "<|end_of_text|>", "added_tokens_decoder": decoder}
    return bpe_folder(folder, config, added_tokens={"<new>": 500})


def special_tokens_in_a_file(folder, _):
    return bpe_folder(
        folder, special_tokens_map={"additional_special_tokens": ["<new>", "<extra>"], "pad_token": "<pad>"}
    )


def named_in_the_configuration(folder, _):
    config = {"eos_token": "<|end_of_text|>", "pad_token": "<pad>", "extra_special_tokens": ["<extra>"]}
    return bpe_folder(folder, config)


def a_plain_piece_that_is_named(folder, _):
    return bpe_folder(folder, {"eos_token": "<|end_of_text|>", "pad_token": "the"})


def sentencepiece_with_added_tokens(folder, model):
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 450}))
    return folder


def vocabulary_and_merges(folder, _):
    folder.mkdir()
    model = json.loads(build_bpe().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    return folder


def tekken(folder, _):
    folder.mkdir()
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocabulary = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    config = {"pattern": pattern, "num_vocab_tokens": 256, "default_vocab_size": 261, "default_num_special_tokens": 5}
    special = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    content = {"config": {**config, "version": "v3"}, "vocab": vocabulary, "special_tokens": special}
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder


READ = [
    only_the_json,
    added_in_the_configuration,
    added_with_spaces_that_belong_to_it,
    added_in_a_file,
    added_in_a_file_that_transformers_passes_over,
    special_tokens_in_a_file,
    named_in_the_configuration,
    a_plain_piece_that_is_named,
    sentencepiece_with_added_tokens,
    vocabulary_and_merges,
    tekken,
]


@pytest.mark.parametrize("build", READ)
def test_ids_length_and_tokens_are_those_of_autotokenizer(build, tmp_path, sentencepiece_model):
    from transformers import AutoTokenizer

    folder = build(tmp_path / "folder", sentencepiece_model)
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_batch(TEXTS) == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert tokenizer.vocab_size == len(theirs)
    for name, number in theirs.get_added_vocab().items():
        assert token_id(tokenizer, name) == number
    whole, plain = theirs("a")["input_ids"], theirs("a", add_special_tokens=False)["input_ids"]
    assert check_reading(tokenizer) == whole[: len(whole) - len(plain)]
    assert same_tokenizer(tokenizer.identity, load_tokenizer(folder).identity)


@pytest.mark.parametrize("build", READ)
def test_the_identity_covers_all_that_is_read_and_nothing_else(build, tmp_path, sentencepiece_model):
    one = load_tokenizer(build(tmp_path / "one", sentencepiece_model))
    other = build(tmp_path / "other", sentencepiece_model)
    config = json.loads((other / "tokenizer_config.json").read_text()) if build is not tekken else {}
    (other / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": "{{ messages }}", "padding_side": "left"})
    )
    assert same_tokenizer(one.identity, load_tokenizer(other).identity)
    changed = dict(config)
    if decoder := config.get("added_tokens_decoder"):
        changed["added_tokens_decoder"] = decoder | {"501": token("<another>")}
    else:
        changed["extra_special_tokens"] = [*config.get("extra_special_tokens", []), "<another>"]
    (other / "tokenizer_config.json").write_text(json.dumps(changed))
    assert not same_tokenizer(one.identity, load_tokenizer(other).identity)


def test_a_folder_that_one_file_says_all_about_keeps_the_hash_of_that_file(tmp_path, sentencepiece_model):
    from megatron_cpt.files import file_hash

    folder = only_the_json(tmp_path / "json", None)
    assert load_tokenizer(folder).identity["hash"] == file_hash(folder / "tokenizer.json")
    (tmp_path / "model").mkdir()
    shutil.copy(sentencepiece_model, tmp_path / "model" / "tokenizer.model")
    assert load_tokenizer(tmp_path / "model").identity["hash"] == file_hash(sentencepiece_model)


def test_the_same_is_told_by_a_process_of_its_own_and_from_the_cache(tmp_path, monkeypatch):
    folder = added_in_the_configuration(tmp_path / "folder", None)
    within = reading.read(folder)
    assert json.loads(json.dumps(within)) == reading._ask(folder)
    first = reading.transformers_reading(folder, needs_definition=True)
    monkeypatch.setattr(reading, "read", lambda _: pytest.fail("asked again"))
    assert json.loads(json.dumps(first)) == reading.transformers_reading(folder, needs_definition=True)
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        reading.transformers_reading(folder)


REFUSED = {
    "vocabulary without a class": (
        {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "#version: 0.2\n"},
        r'cannot read the tokenizer.*\{"tokenizer_class": "GPT2Tokenizer"\}.*save_pretrained',
    ),
    "tiktoken of Llama 3": ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "tiktoken vocabulary.*TikTokenConverter"),
    "tiktoken of Qwen": (
        {
            "qwen.tiktoken": "IQ== 0\nIg== 1\n",
            "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", null]}}',
        },
        "tiktoken vocabulary.*TikTokenConverter",
    ),
    "nothing": ({"config.json": "{}"}, "holds neither tokenizer.json nor tokenizer.model"),
    "list for an object": ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "An object is needed"),
    "brackets without end": ({"tokenizer_config.json": "[" * 100_000, "tokenizer.json": "{}"}, "not valid JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_way_out(name, tmp_path):
    files, message = REFUSED[name]
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_parts_of_tokenizers_and_tiktoken_files_are_refused_by_name(tmp_path):
    for name, message in (
        ("tekken.json", "Name the folder"),
        ("vocab.json", "Name the folder"),
        ("x.tiktoken", "tiktoken"),
    ):
        (tmp_path / name).write_text("IQ== 0\n")
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name)
    (tmp_path / "x.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match="tiktoken vocabulary"):
        load_tokenizer(tmp_path / "x.model")


def test_code_in_a_folder_is_not_executed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Code", None]}}))
    (folder / "vocab.json").write_text("{}")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(folder)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_transformers_reads_otherwise_is_refused_with_both_ways_out(tmp_path, sentencepiece_model):
    """transformers' LlamaTokenizer puts no second space before a text that begins with one."""
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(sentencepiece_model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(
        DataError, match=r"read otherwise than by transformers.*save_pretrained.*tokenizer\.model itself"
    ):
        check_reading(load_tokenizer(folder))
    assert check_reading(load_tokenizer(folder / "tokenizer.model")) == []


def test_a_setting_that_changes_ids_is_noticed(tmp_path):
    """A class may build the tokenizer anew and leave out what tokenizer.json says, such as another normal form."""
    from tokenizers import normalizers

    folder = save_tokenizer(build_bpe(normalizer=normalizers.Lowercase()), tmp_path / "folder")
    config = {"eos_token": "<|end_of_text|>", "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokenizer = load_tokenizer(folder)
    if tokenizer.encode_batch(["THE"]) == theirs(["THE"], add_special_tokens=False)["input_ids"]:
        pytest.skip("this version of transformers keeps the normalizer")
    with pytest.raises(DataError, match="read otherwise than by transformers"):
        check_reading(tokenizer)


def test_without_transformers_the_reading_is_kept_and_the_user_told(tmp_path, monkeypatch, caplog):
    folder = only_the_json(tmp_path / "folder", None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.delitem(sys.modules, "transformers")
    assert check_reading(load_tokenizer(folder)) == []
    assert "read without comparing" in caplog.text


def test_what_is_named_as_bos_is_not_put_before_texts_unless_the_post_processor_does(tmp_path):
    from tokenizers.processors import TemplateProcessing

    plain = bpe_folder(tmp_path / "plain", {"eos_token": "<|end_of_text|>", "bos_token": "<|end_of_text|>"})
    assert check_reading(load_tokenizer(plain)) == []
    tokenizer = build_bpe()
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 500)])
    folder = save_tokenizer(tokenizer, tmp_path / "with")
    assert check_reading(load_tokenizer(folder)) == load_tokenizer(folder).prefix_ids() == [500]
    assert load_tokenizer(folder / "tokenizer.json").prefix_ids() == [500]


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    folder = added_in_a_file(tmp_path / "folder", None)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert load_tokenizer(folder).vocab_size == 502
