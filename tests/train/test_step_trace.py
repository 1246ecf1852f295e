"""What a run says it read is what its steps read, across a restart under another layout, to the document and line."""

import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest
from megatron_cpt.cli import main
from megatron_cpt.data.shards.indexed import document_bounds, read_index, read_tokens
from megatron_cpt.data.tokenize.driver import tokenize
from megatron_cpt.data.tokenize.options import TokenizeOptions
from megatron_cpt.errors import DataError
from tests.train.test_loop import run_path, run_stage

SEQ, BATCH, SKIPPED = 32, 8, 5


def recorded_stage(task: str, folder: str, overrides: tuple[str, ...]) -> str:
    """Train, and write what each step of this rank got: (sample id, entry, token ids)."""
    import os

    from megatron_cpt.train.stage import loop

    original, seen = loop.train_step, []

    def step(model, optimizer, batches, *arguments, **options):
        seen.extend(
            (int(sample), int(entry), row.tolist())
            for batch in batches
            for sample, entry, row in zip(batch.sample_ids, batch.dataset_ids, batch.tokens, strict=True)
        )
        return original(model, optimizer, batches, *arguments, **options)

    loop.train_step = step
    try:
        return run_stage(task, "base", overrides)
    finally:
        loop.train_step = original
        Path(folder, f"{overrides[0]}-{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(seen))


@pytest.fixture(scope="module")
def traced(ranks, experiment_data, tmp_path_factory):
    """Return (run directory, what the steps of a run with a restart read): one rank, then two."""
    from tests.train import conftest

    folder = tmp_path_factory.mktemp("traced")
    data = folder / "data"
    shutil.copytree(experiment_data, data, ignore=shutil.ignore_patterns("D1_text_document.*"))
    tokenize(
        [data / "D1.jsonl"],
        data / "tokenizer",
        output_prefix=data / "tokens/D1",
        options=TokenizeOptions(provenance=True),
    )
    task = conftest.write_experiment(folder, data)
    run = run_path(task, "base")
    run.mkdir(parents=True)
    common = ("data.mix={D0: 0.25, D1: 0.75}", f"data.skip_iterations=['{SKIPPED}']")
    (run / "stop_now").touch()
    assert ranks.run(recorded_stage, 1, str(task), str(folder), ("launch.nodes=1", *common)) == ["stop_now"]
    two = ("launch.gpus_per_node=2", "training.micro_batch_size=1", *common)
    assert ranks.run(recorded_stage, 2, str(task), str(folder), two) == ["finished"] * 2
    seen = [row for file in sorted(folder.glob("*.pickle")) for row in pickle.loads(file.read_bytes())]
    return run, sorted(seen), data


def test_the_ledger_equals_a_recount_of_every_batch(traced):
    run, seen, _ = traced
    expected = [n for n in range(8 * BATCH) if n // BATCH != SKIPPED - 1]
    assert [sample for sample, _, _ in seen] == expected
    corpora = Counter(("D0", "D1")[entry] for _, entry, _ in seen)
    manifest = read_manifest(run / "checkpoints" / "iter_0000008")
    assert manifest["tokens_per_corpus"] == {name: count * SEQ for name, count in corpora.items()}


def test_a_step_is_traced_to_what_it_read(traced):
    from megatron_cpt.train.tools.step_trace import RunTrace

    run, seen, data = traced
    trace = RunTrace(run)
    tokens = {sample: row for sample, _, row in seen}
    found = {}
    for iteration in range(1, 9):
        assert trace.is_skipped(iteration) == (iteration == SKIPPED)
        for sample in trace.samples(iteration):
            index = read_index(Path(sample.prefix))
            ids, bounds = read_tokens(index), document_bounds(index)
            read = [
                ids[bounds[part.document] + part.first_token :][: part.num_tokens].tolist() for part in sample.parts
            ]
            found[sample.sample] = [token for part in read for token in part]
            for part in sample.parts:
                if sample.corpus == "D0":
                    assert part.origin is None
                else:
                    assert part.origin == f"{data}/D1.jsonl:{part.document + 1}"
    assert {sample: row for sample, row in found.items() if sample in tokens} == tokens


def traced_tokens(run: Path) -> dict[int, list[int]]:
    """Return the tokens of every sample of a run, as its trace names them."""
    from megatron_cpt.train.tools.step_trace import RunTrace

    trace, found = RunTrace(run), {}
    for iteration in range(1, 9):
        for sample in trace.samples(iteration):
            index = read_index(Path(sample.prefix))
            ids, bounds = read_tokens(index), document_bounds(index)
            starts = [(int(bounds[part.document]) + part.first_token, part.num_tokens) for part in sample.parts]
            found[sample.sample] = [int(token) for start, count in starts for token in ids[start : start + count]]
    return found


@pytest.mark.full
def test_ledger_and_trace_follow_a_run_whose_blend_was_changed(ranks, experiment, tmp_path):
    run = run_path(experiment, "base")
    mixes = ("data.mix={D0: 0.25, D1: 0.75}", "data.mix={D0: 0.75, D1: 0.25}", "data.mix={D0: 0.5, D1: 0.5}")
    accept = "checkpoint.accept_changes=[data]"

    def train(number: int, *more: str) -> list:
        name = f"launch.walltime={number}00000"
        ranks.run(recorded_stage, 1, str(experiment), str(tmp_path), (name, *more))
        return pickle.loads((tmp_path / f"{name}-0.pickle").read_bytes())

    def drop(*iterations: int, newest: int) -> None:
        for iteration in iterations:
            shutil.rmtree(run / "checkpoints" / f"iter_{iteration:07d}")
        (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(f"{newest}\n")

    def check(*parts: list) -> None:
        seen = sorted(row for part in parts for row in part)
        assert [sample for sample, _, _ in seen] == list(range(8 * BATCH))
        corpora = Counter(("D0", "D1")[entry] for _, entry, _ in seen)
        manifest = read_manifest(run / "checkpoints" / "iter_0000008")
        assert manifest["tokens_per_corpus"] == {name: count * SEQ for name, count in corpora.items()}
        assert traced_tokens(run) == {sample: row for sample, _, row in seen}

    save = "checkpoint.save_interval=2"
    first = train(1, mixes[0], save)
    check(first)
    drop(6, 8, newest=4)
    second = train(2, mixes[1], save, accept)
    check([row for row in first if row[0] < 4 * BATCH], second)
    drop(8, newest=6)
    third = train(3, mixes[2], save, accept)
    check([r for r in first if r[0] < 4 * BATCH], [r for r in second if r[0] < 6 * BATCH], third)
    assert sorted(path.name for path in (run / "superseded").iterdir()) == ["iter_0000004", "iter_0000006"]
    drop(4, 6, 8, newest=2)  # back to before the first change
    fourth = train(4, mixes[2], save, accept)
    check([r for r in first if r[0] < 2 * BATCH], fourth)
    assert [path.name for path in (run / "superseded").iterdir()] == ["iter_0000002"]


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["data", "trace", *arguments])
    return ended.value.code


def test_the_verb_prints_the_documents_of_a_range(traced, capsys):
    run, _, data = traced
    assert exit_code("--run", str(run), "--iteration", "4-5") == 0
    output = capsys.readouterr().out
    assert "iteration 4, sample 24: " in output and "iteration 5: skipped" in output
    assert f"{data}/D1.jsonl:" in output and "no provenance sidecar" in output
    assert exit_code("--run", str(run), "--iteration", "9") == 2
    assert exit_code("--iteration", "9") == 2
    assert exit_code("--document", "9") == 2


def test_a_folder_that_is_no_run_is_named(tmp_path):
    from megatron_cpt.train.tools.step_trace import RunTrace

    with pytest.raises(DataError, match="config.yaml: no such file"):
        RunTrace(tmp_path)
