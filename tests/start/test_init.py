"""`init` writes a task that passes a run's checks, from a model's folder and documents as a stranger has them."""

import gzip
import json
import random
import re
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_cpt.cli import main
from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.data.shards.corpus_documents import document_inputs, document_problems
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.errors import CheckpointError, ConfigError, CptError, DataError
from megatron_cpt.start import tiny
from megatron_cpt.start.held_out import held_out_of
from megatron_cpt.start.init import init_task
from megatron_cpt.start.look import CorpusLook, look_at
from megatron_cpt.start.named_patterns import named_patterns
from megatron_cpt.start.params_file import read_model
from megatron_cpt.start.propose import Machine, layout_for, length_and_batch, machine_of
from tests.guide_scratch import build_base, build_tokenizer
from tests.tolerances import assert_about

WORDS = "the a model learns text from books and letters slowly with care in long plain sentences".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return a random Llama with its tokenizer, outside the folder that commands are called in."""
    folder = tmp_path_factory.mktemp("models")
    build_tokenizer(folder / "tokenizer")
    build_base(folder / "Base-Model", folder / "tokenizer")
    return folder / "Base-Model"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_documents(path: Path, count: int, seed: int = 0, words: tuple[int, int] = (20, 120)) -> list[str]:
    chooser = random.Random(seed)
    texts = [" ".join(chooser.choices(WORDS, k=chooser.randrange(*words))) for _ in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return texts


def test_a_task_is_written_that_a_run_can_be_made_of(model, here):
    write_documents(here / "corpus" / "ja" / "one.jsonl", 3000)
    write_documents(here / "corpus" / "en.jsonl", 3000, seed=1)
    made = init_task(
        Path("ja"),
        model=str(model),
        documents={"ja": ["corpus/ja/*.jsonl"]},
        replay={"en": ["corpus/en.jsonl"]},
        tokens="200K",
        replay_share=0.25,
        held_out="1/20",
    )
    config = load_config(Path("ja"), "base-model", "200K").config
    assert config == made.config
    assert config.model == read_model(model)
    assert config.init.from_path == str(model)
    assert config.data.mix == {"ja": 0.75, "en": 0.25}
    assert config.data.corpora["ja"].held_out == 0.05
    assert config.data.corpora["ja"].documents == ("../../corpus/ja/*.jsonl",)
    # a relative path of the file starts at the data folder
    assert (here / config.paths.data_dir / "../../corpus/en.jsonl").resolve() == here / "corpus/en.jsonl"
    assert config.training.train_tokens == 200_000
    assert config.training.seq_length == 64  # the model's context
    assert made.next_command == "megatron-cpt submit pipeline ja"


def test_the_estimate_of_tokens_is_close_for_every_form_of_file(model, here):
    tokenizer = load_tokenizer(model)
    for name in ("a.jsonl", "a.parquet", "a.jsonl.gz"):
        texts = write_documents(here / name, 12_000)
        true = sum(map(len, tokenizer.encode_batch(texts))) + len(texts)
        found = look_at("a", [name], tokenizer)
        within = 0.2 if name.endswith("gz") else 0.02
        assert_about(found.tokens, true, within=within, why="a sample of the text, and gzip hides the size")
    few = write_documents(here / "few.jsonl", 30)
    true = sum(map(len, tokenizer.encode_batch(few))) + len(few)
    assert look_at("few", ["few.jsonl"], tokenizer).tokens == true  # read whole: exact


def test_a_mix_of_many_files_is_looked_at_in_proportion(model, here):
    for number in range(20):
        write_documents(here / "many" / f"{number}.jsonl", 20 * (number + 1), seed=number)
    tokenizer = load_tokenizer(model)
    texts = [json.loads(line)["text"] for path in (here / "many").iterdir() for line in path.read_text().splitlines()]
    true = sum(map(len, tokenizer.encode_batch(texts))) + len(texts)
    found = look_at("many", ["many"], tokenizer)
    assert found.num_files == 20
    assert_about(found.tokens, true, within=0.05, why="a sample of the text of each file")


def test_nothing_is_overwritten(model, here):
    write_documents(here / "x.jsonl", 3000)
    arguments = {"model": str(model), "documents": {"x": ["x.jsonl"]}, "tokens": "100K"}
    init_task(Path("ja"), **arguments)
    before = (here / "ja" / "task.yaml").read_text()
    with pytest.raises(ConfigError, match="ja: exists already"):
        init_task(Path("ja"), **arguments)
    assert (here / "ja" / "task.yaml").read_text() == before


REFUSED = {
    "no tokens": ({"tokens": None}, ConfigError, "--tokens: not given"),
    "tokens that are no number": ({"tokens": "lots"}, ConfigError, "--tokens lots"),
    "too few tokens": ({"tokens": "1000"}, ConfigError, "Give more tokens"),
    "no documents": ({"documents": {}}, ConfigError, "--documents: none"),
    "documents that are not there": ({"documents": {"x": ["nowhere/*.jsonl"]}}, DataError, "nowhere"),
    "text under another key": (
        {"documents": {"x": ["body.jsonl"]}},
        DataError,
        "x: no text in body.jsonl. .* the key `text`",
    ),
    "a model that is not there": ({"model": "./nowhere"}, CheckpointError, "no such folder, and no name on the Hub"),
    "a misspelt folder in a folder": ({"model": "models/nowhere"}, CheckpointError, "models/nowhere: no such folder"),
    "a folder without config.json": ({"model": "."}, CheckpointError, "no config.json"),
    "one name for both": ({"replay": {"x": ["x.jsonl"]}}, ConfigError, "a name of its own"),
    "a corpus called buffer": ({"documents": {"buffer": ["x.jsonl"]}}, ConfigError, "cannot name a corpus"),
    "a share that is none": ({"replay": {"y": ["x.jsonl"]}, "replay_share": 1.5}, ConfigError, "--replay-share 1.5"),
    "a part that is none": ({"held_out": "5"}, ConfigError, "--held-out"),
    "a site that is not there": ({"site": "atlantis"}, ConfigError, "no such site"),
    "a site without memory": ({"site": "slurm/sites/generic.yaml"}, ConfigError, "site.gpu_memory_gib"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name_and_leaves_nothing(model, here, case):
    write_documents(here / "x.jsonl", 3000)
    (here / "body.jsonl").write_text('{"body": "text"}\n' * 9)
    (here / "models").mkdir()  # else models/nowhere is asked of the Hub
    changes, kind, message = REFUSED[case]
    arguments = {"model": str(model), "documents": {"x": ["x.jsonl"]}, "tokens": "100K"} | changes
    with pytest.raises(CptError, match=message) as raised:
        init_task(Path("ja"), **arguments)
    assert isinstance(raised.value, kind)
    assert not (here / "ja").exists()


def test_a_layout_of_a_site_fits_its_gpus(model, here):
    write_documents(here / "x.jsonl", 3000)
    made = init_task(Path("ja"), model=str(model), documents={"x": ["x.jsonl"]}, tokens="1M", site="leonardo")
    assert made.config.launch.gpus_per_node == 4
    assert made.config.training.precision == "bf16"
    assert made.next_command.endswith("--site leonardo")


@pytest.mark.parametrize(("params", "nodes", "gpus", "memory"), [("llama3-8b", 1, 8, 80.0), ("llama3-70b", 2, 8, 80.0)])
def test_a_large_model_gets_as_few_nodes_as_hold_it(params, nodes, gpus, memory):
    from megatron_cpt.start.init import _first_config

    model = load_config(Path("tasks/template"), params, "50B").config.model
    length, batch, lr = length_and_batch(model, 50_000_000_000)
    assert (length, batch) == (8192, 512)
    machine = Machine(ranks_per_node=gpus, gpu_memory_gib=memory, found="a test")
    found, note = layout_for(_first_config(model, length, batch, lr, 50_000_000_000), machine)
    assert found.launch.nodes >= nodes and found.launch.nodes & (found.launch.nodes - 1) == 0
    assert "plan --search" in note


def test_a_machine_without_gpus_trains_on_its_cores(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    machine = machine_of(None, None)
    assert machine.gpu_memory_gib is None and machine.ranks_per_node in (1, 2)


def test_the_verb_makes_a_tiny_model_and_text_of_its_own(here, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["init", "first", "--model", "tiny"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert printed.startswith("first/task.yaml\nfirst/params/tiny.yaml\n")
    assert "megatron-cpt submit pipeline first" in printed
    config = load_config(Path("first"), "tiny", "400K").config
    assert Path(config.init.from_path or "") == Path("data/first/models/tiny")
    assert read_model(Path("data/first/models/tiny")).num_layers == 2
    assert config.data.mix == {"python": 0.9, "prose": 0.1}
    assert max(len(line) for line in (here / "data/first/documents/python.jsonl").read_text().splitlines()) > 1000


def test_the_tiny_text_is_what_it_says(here):
    paths = tiny.write_texts(here)
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    assert all(0.7 * tiny.CORPORA[name] < size < 1.5 * tiny.CORPORA[name] for name, size in sizes.items())


def test_the_architecture_of_a_folder_becomes_a_params_file(model, here, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["params", "from-hf", str(model), "--output", "params/mine.yaml"])
    assert not ended.value.code
    (here / "t").mkdir()
    (here / "t" / "task.yaml").write_text(
        "sizes: {s: {training: {train_iters: 10, seq_length: 64, global_batch_size: 8, micro_batch_size: 8}}}\n"
        "data: {tokenizer: t, corpora: {x: {tokens: [x]}}, mix: {x: 1.0}}\noptimizer: {lr: 1e-4}\nevaluation: {eval_interval: 0}\n"
    )
    assert load_config(Path("t"), "mine", "s").config.model == read_model(model)
    with pytest.raises(SystemExit) as ended:
        main(["params", "from-hf", str(model), "--output", "params/mine.yaml"])
    assert ended.value.code == 2 and "exists already" in capsys.readouterr().err


def test_documents_and_model_are_found_before_the_data_folder_is_made(model, here, capsys):
    """The first command after `init` reads `data/TASK/../../corpus`, where no `data` is yet."""
    write_documents(here / "corpus" / "ja.jsonl", 3000)
    (here / "models").mkdir()
    shutil.copytree(model, here / "models" / "base")
    init_task(Path("ja"), model="models/base", documents={"ja": ["corpus/*.jsonl"]}, tokens="200K")
    config = load_config(Path("ja"), "base", "200K").config
    assert not (here / "data").exists()
    assert document_inputs(config.paths, config.data.corpora["ja"].documents) == ["corpus/*.jsonl"]
    assert document_problems(config) == []
    assert data_path(config.paths, config.data.tokenizer) == config.init.from_path == "models/base"
    with pytest.raises(SystemExit, match="^0$"):
        main(["submit", "pipeline", "ja", "--dry-run"])
    words = capsys.readouterr().out
    assert "documents=corpus/*.jsonl" in words and "--tokenizer models/base" in words
    (here / "data" / "ja").mkdir(parents=True)  # a stage makes it: the same words, so that nothing is made twice
    assert document_inputs(config.paths, config.data.corpora["ja"].documents) == ["corpus/*.jsonl"]


def test_a_linked_data_folder_leads_to_the_same_documents(model, here):
    write_documents(here / "corpus" / "ja.jsonl", 3000)
    (here / "scratch" / "deep" / "data").mkdir(parents=True)
    (here / "data").symlink_to("scratch/deep/data")
    init_task(Path("ja"), model=str(model), documents={"ja": ["corpus/*.jsonl"]}, tokens="200K")
    config = load_config(Path("ja"), "base-model", "200K").config
    assert document_problems(config) == []


@pytest.mark.full
def test_a_tokenizer_that_transformers_reads_otherwise_is_refused_before_a_task_is_written(model, here):
    """A Qwen2 folder whose tokenizer was trained elsewhere: transformers splits text as Qwen2 does, and adds its end of text."""
    write_documents(here / "x.jsonl", 3000)
    shutil.copytree(model, here / "qwen")
    edit_json(here / "qwen" / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(DataError, match="is read otherwise than by transformers"):
        init_task(Path("ja"), model="qwen", documents={"x": ["x.jsonl"]}, tokens="100K")
    assert not (here / "ja").exists()


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


HELD_OUT = {
    # documents, tokens, seq_length -> part: 40 documents and 16 sequences at least, at most a fifth
    "large": (1_000_000, 500_000_000, 4096, "1/1000"),
    "as many as are enough": (40_000, 100_000_000, 4096, "1/1000"),
    "some thousands": (8_000, 40_000_000, 2048, "1/200"),
    "hundreds": (800, 89_600, 256, "1/20"),
    "few long documents": (50, 10_000_000, 4096, "1/5"),
    "long sequences": (100_000, 10_000_000, 8192, "1/50"),
}


@pytest.mark.parametrize("case", HELD_OUT)
def test_what_is_held_out_is_enough_to_measure(case):
    documents, tokens, seq_length, part = HELD_OUT[case]
    assert held_out_of(corpus_of(documents, tokens), seq_length, None) == part


@pytest.mark.parametrize(
    ("word", "advice"), [("ja=", "no files. Write --documents ja=GLOB"), ("=a/*", "NAME=a/\\*"), ("a/*", "NAME=a/\\*")]
)
def test_half_a_corpus_is_refused_with_the_right_form(word, advice):
    with pytest.raises(ConfigError, match=f"--documents {re.escape(word)}: .*{advice}\\.$"):
        named_patterns([word], "--documents")


def test_a_part_that_holds_no_sequences_is_refused():
    assert held_out_of(corpus_of(1000, 100_000), 256, "0.01") == "0.01"
    for given, tokens in (("1/1000", 100_000), (None, 2000)):
        with pytest.raises(DataError, match=r"ja: 1/(1000|5) of its about 1,000 documents .* two sequences of 256"):
            held_out_of(corpus_of(1000, tokens), 256, given)


def corpus_of(documents: int, tokens: int) -> CorpusLook:
    return CorpusLook(
        name="ja",
        patterns=("ja",),
        num_files=1,
        num_bytes=tokens * 4,
        documents=documents,
        tokens=tokens,
        bytes_per_token=4.0,
    )
