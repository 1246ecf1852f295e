"""report.html: what it holds, that it stays small, and that a real browser draws it without an error."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.evaluate.page.build import LivePage, marks, write_page
from megatron_cpt.evaluate.page.curves import train_curves
from megatron_cpt.evaluate.page.measured import measured
from megatron_cpt.evaluate.report.stages import read_stage
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.find import find_runs, report_dir
from megatron_cpt.run.ledger import append_record
from tests.tolerances import assert_about

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def records(num_iterations: int, *, killed_at: int | None = None) -> list[dict]:
    found = [start(0, "TP1 PP1 DP2", resumed=False)]
    iteration = 0
    while iteration < num_iterations:
        iteration += 1
        place = {"iteration": iteration, "consumed_tokens": iteration * 1000, "time": 1e9 + iteration}
        train = {"loss": 9.0 / iteration**0.3, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 2000.0}
        found.append({"kind": "train", **place, **train, "step_seconds": 0.5, "data_seconds": 0.1, "eta_seconds": 9.0})
        if iteration % 10 == 0:
            found += [
                {"kind": "validation", **place, "corpus": corpus, "loss": 1.0, "bits_per_byte": 2.0 / iteration}
                for corpus in ("old", "new")
            ]
        if iteration == killed_at:
            killed_at, iteration = None, iteration - 5
            found.append(start(iteration, "TP2 PP1 DP1", resumed=True))
    return [*found, {"kind": "end", "iteration": num_iterations, "reason": "finished", "time": 2e9}]


def start(iteration: int, layout: str, *, resumed: bool) -> dict:
    place = {"iteration": iteration, "consumed_tokens": iteration * 1000, "time": 1e9 + iteration}
    return {"kind": "start", **place, "resumed": resumed, "layout": layout}


def change(model: str, text: str, value: float, spread: float = 0.01) -> dict:
    verdict = "learned" if value + spread < 0 else "forgot" if value - spread > 0 else "unchanged"
    ends = {"change_low": value - spread, "change_high": value + spread}
    return {
        "model": model, "text": text, "bits_per_byte": 2 + value, "low": 1.9, "high": 2.1, "change": value, **ends,
        "reference": "base", "verdict": verdict,
    }  # fmt: skip


@pytest.fixture
def full_run(write_run) -> Path:
    """Return a run with everything a page shows."""
    run = write_run("replay", records(60, killed_at=40), blend={"new": 55_000, "old": 5_000})
    (run / "config.yaml").write_text(
        "task: ja\n\noptimizer:\n  lr: 0.001  # params/x.yaml\n  clip_grad: 1.0  # default\n"
    )
    (run / "revision.txt").write_text("0.1.0 abc\n")
    (run / "environment.json").write_text(json.dumps({"torch": "2.13"}))
    logs = run / "logs" / "one"
    logs.mkdir(parents=True)
    (logs / "rank0.log").write_text("")
    append_record(run / "jobs", "job-7", stage="train", state="running", log_dir=str(logs))
    append_record(run / "jobs", "job-7", state="finished", exit_code=0)
    checkpoint = run / "checkpoints" / "iter_0000060"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(
        json.dumps(
            {
                "iteration": 60,
                "consumed_tokens": 60_000,
                "tokens_per_corpus": {"new": 54_000, "old": 6_000},
                "files": {"a": {"bytes": 3 << 20}},
            }
        )
    )
    soup = run / "soup" / "last_2"
    soup.mkdir(parents=True)
    (soup / "merge_info.json").write_text(json.dumps({"method": "average", "inputs": [{"path": "x/iter_1"}]}))
    (run / "report").mkdir()
    changes = [
        change("base", "old", 0),
        change("cpt", "old", 0.1),
        change("base", "new", 0),
        change("cpt", "new", -1.0),
    ]
    (run / "report" / "forgetting.json").write_text(json.dumps({"results": [], "changes": changes}))
    texts = {"base": ["<script>alert(1)</script>"], "cpt": ["return x"]}
    (run / "report" / "samples.json").write_text(json.dumps({"prompts": ["def f(x):"], "texts": texts}))
    return run


def test_a_page_shows_everything_a_run_directory_knows(full_run):
    text = write_page([full_run], full_run / "report" / "report.html").read_text()
    shown = re.sub(r"<script.*?</script>|<style.*?</style>", "", text, flags=re.DOTALL)
    for part in (
        "re-layout", "killed at 40K, resumed from 35K tokens, TP1 DP2 → TP2 DP1",  # what happened
        "job-7", 'href="../logs/one/rank0.log"', "iter_0000060", "3.0 MiB", "average of iter_1",
        "54,000", "90.00 %", "91.67 %",  # drawn 54 of 60, planned 55 of 60
        "optimizer.lr", "params/x.yaml", "0.1.0 abc", "torch", "return x", "learned", "forgot",
    ):  # fmt: skip
        assert part in shown, part
    assert "alert(1)" not in re.sub(r"&lt;script&gt;alert\(1\)&lt;/script&gt;", "", shown)


def test_a_page_needs_nothing_from_outside(full_run):
    text = write_page([full_run], full_run / "report" / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
    assert "default-src 'none'" in text


def test_bars_of_all_texts_have_one_scale(full_run):
    rows = measured(full_run / "report" / "forgetting.json")["rows"]
    widths = {row["text"]: row["width"] for row in rows if row["model"] == "cpt"}
    # the whole width is from -1.01 to 0.11
    assert_about(widths, {"new": 100 * 1.0 / 1.12, "old": 100 * 0.1 / 1.12}, within=1e-3, why="a page has two decimals")


def test_a_run_of_a_million_steps_stays_a_page_of_few_megabytes_and_keeps_its_spike(write_run, tmp_path):
    steps = [
        {"kind": "train", "iteration": i, "consumed_tokens": i * 4096, "loss": 2.0 if i != 77_777 else 11.0, "lr": 1e-4}
        for i in range(1, 200_001)
    ]
    run = write_run("long", [start(0, "TP1", resumed=False), *steps])
    assert write_page([run], tmp_path / "page.html").stat().st_size < 1_000_000
    curves = train_curves(read_stage(run), 2000)
    assert len(curves["loss"]) == 2000
    assert max(curves["loss_high"]) == 11.0
    assert curves["tokens"][-1] == 200_000 * 4096
    assert curves["loss"][0] == 2.0


def test_many_runs_share_the_points_of_a_page(write_run, tmp_path):
    runs = [write_run(f"v{index}", records(600)) for index in range(40)]
    assert write_page(runs, tmp_path / "page.html").stat().st_size < 3_000_000


def test_a_run_that_has_only_jobs_has_a_page(tmp_path):
    append_record(
        tmp_path / "run" / "jobs", "tok-1", stage="tokenize", name="tokenize-new", state="failed", reason="disk full"
    )
    text = write_page([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "tokenize-new" in text and "disk full" in text


def test_spikes_and_saves_are_marked_where_they_were(write_run):
    spike = {"kind": "spike", "iteration": 20, "consumed_tokens": 20_000, "loss": 9.0, "median": 2.0}
    save = {"kind": "save", "iteration": 30, "seconds": 1.5}
    run = write_run("x", [*records(40)[:-1], spike, save])
    found = {mark["kind"]: mark for mark in marks(read_stage(run))}
    assert found["spike"]["tokens"] == 20_000
    assert found["save"]["tokens"] == 30_000 and "1.5 s" in found["save"]["text"]


def test_a_live_page_never_stops_its_run(full_run, caplog):
    page = LivePage(RunDir(full_run), is_writer=True)
    (full_run / "report" / "samples.json").write_text("[1]")
    page.rewrite()
    assert "not written" in caplog.text and not (full_run / "report" / "report.html").exists()
    (full_run / "report" / "samples.json").unlink()
    page.rewrite(is_last=True)
    assert (full_run / "report" / "report.html").exists()


def test_a_live_page_takes_a_hundredth_of_the_time_at_most(full_run, monkeypatch):
    times = iter([1000.0, 1002.0, 1100.0, 1203.0, 1203.5])
    monkeypatch.setattr("megatron_cpt.evaluate.page.build.time.monotonic", lambda: next(times))
    path, page = full_run / "report" / "report.html", LivePage(RunDir(full_run), is_writer=True)
    written = []
    for _ in range(3):  # at 1000 (takes 2 s), 1100 (too soon), 1203
        page.rewrite()
        written.append(path.exists())
        path.unlink(missing_ok=True)
    assert written == [True, False, True]


def test_a_rank_that_does_not_write_writes_no_page(full_run):
    LivePage(RunDir(full_run), is_writer=False).rewrite(is_last=True)
    assert not (full_run / "report" / "report.html").exists()


def test_foreign_samples_are_refused_by_name(full_run, tmp_path):
    (tmp_path / "bad.json").write_text('{"texts": {"base": []}, "prompts": ["a"]}')
    with pytest.raises(DataError, match=r"bad\.json: not written by `evaluate generate"):
        write_page([full_run], tmp_path / "page.html", sample_paths=[tmp_path / "bad.json"])


def test_runs_are_named_by_themselves_a_folder_or_a_task(write_run, tmp_path, monkeypatch):
    runs = [write_run(name, records(10)) for name in ("base", "replay")]
    (tmp_path / "tasks" / "demo").mkdir(parents=True)
    (tmp_path / "tasks" / "demo" / "task.yaml").write_text("sizes: {300K: {}}\n")
    monkeypatch.chdir(tmp_path)
    below = [Path("runs/demo/demo-5m/300K/base"), Path("runs/demo/demo-5m/300K/replay")]
    assert find_runs([Path("runs")]) == below
    assert find_runs([Path("tasks/demo")]) == find_runs([Path("demo")]) == below
    assert find_runs([runs[1], tmp_path / "runs"]) == [runs[1], runs[0]]  # each once, as it was first named
    assert report_dir(Path("tasks/demo")) == Path("runs/demo/report")
    with pytest.raises(ConfigError, match="no run in it"):
        find_runs([Path("tasks")])


def test_the_verb_writes_both_pages_of_a_task(write_run, tmp_path, monkeypatch, capsys):
    write_run("base", records(30)), write_run("replay", records(20), parent="base")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["report", "runs/demo"])
    assert not ended.value.code
    assert capsys.readouterr().out == "runs/demo/report/report.md\nruns/demo/report/report.html\n"
    assert Path("runs/demo/report/report.html").exists()


def test_runs_of_one_name_are_told_apart(write_run, tmp_path):
    first = write_run("main", records(10))
    second = tmp_path / "runs" / "other" / "demo-5m" / "300K" / "main"
    shutil.copytree(first, second)
    text = write_page([first, second], tmp_path / "page.html").read_text()
    assert ">demo/demo-5m/300K/main<" in text and ">other/demo-5m/300K/main<" in text


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed (installers/browser_package.sh)")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_every_curve_without_an_error(full_run, tmp_path, theme):
    page = write_page([full_run], full_run / "report" / "report.html")
    picture = tmp_path / "page.png"
    messages, dom = browse(page, theme, picture, tmp_path)
    assert "CONSOLE" not in messages, messages
    assert '<html lang="en" data-theme="' + theme in dom
    assert 'data-charts="7"' in dom  # loss, two corpora, learning rate, gradient norm, speed, waiting
    pixels = (matplotlib.image.imread(picture)[:, :, :3] * 255).round().astype(int)
    background = {"light": (255, 255, 255), "dark": (0x14, 0x17, 0x1B)}[theme]
    assert (np.abs(pixels - background).sum(2) < 8).mean() > 0.7
    # curves in the run's own colour, beyond the switches and dots that show it too
    curve = np.abs(pixels - (0x1F, 0x83, 0xC6)).sum(2) < 60
    assert curve.sum() > 4000
    assert curve[:, curve.shape[1] // 3 :].any(0).mean() > 0.5


def browse(page: Path, theme: str, picture: Path, scratch: Path) -> tuple[str, str]:
    """Return what the browser says and the page's elements after its scripts have run; take a picture of it."""
    words = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={scratch}/profile",
    ]
    words += [f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}", "--enable-logging=stderr"]
    words += ["--window-size=1300,1400", "--virtual-time-budget=3000"]
    said = ""
    for output in (f"--screenshot={picture}", "--dump-dom"):
        answer = subprocess.run([*words, output, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stderr
        said += answer.stderr
    return said, answer.stdout
