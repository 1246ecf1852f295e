"""Shell lists that compute are evaluated by bash where nothing can be harmed, and refused elsewhere."""

import os
import subprocess

import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.lists import evaluated
from megatron_cpt.data.lists.data_list import read_data_list
from megatron_cpt.data.lists.evaluated import evaluate_shell_list
from megatron_cpt.data.lists.sandbox import SandboxError, run_in_sandbox
from megatron_cpt.errors import DataError

ENVIRONMENT = {"PATH": os.environ["PATH"]}


def has_sandbox() -> bool:
    try:
        return run_in_sandbox(["true"], ENVIRONMENT, 5).returncode == 0
    except SandboxError:
        return False


needs_sandbox = pytest.mark.skipif(not has_sandbox(), reason="the kernel gives users no namespaces")

LISTS = {
    "second arrays": (
        "EN=(5 en_a 6 en_b)\nJA=(7 ja_a)\nexport TRAIN_DATA_PATH=(\n  ${EN[@]}\n  ${JA[@]}\n)\n",
        [(5, "en_a"), (6, "en_b"), (7, "ja_a")],
    ),
    "calc with variables set above": (
        'calc() { echo "$(($1 * $2)) $3"; }\nREPEAT=3\nN=11\nTRAIN_DATA_PATH=(\n  $(calc $REPEAT $N a)\n  $(calc 1 $N b)\n)\n',
        [(33, "a"), (11, "b")],
    ),
    "ratios of totals": (
        "A=30; B=10; TOTAL=$((A + B))\nTRAIN_DATA_PATH=($((A * 100 / TOTAL)) a $((B * 100 / TOTAL)) b)\n",
        [(75, "a"), (25, "b")],
    ),
    "nested expansion and loops": (
        'ROOT=/d\nTRAIN_DATA_PATH=()\nfor n in 1 2; do TRAIN_DATA_PATH+=($n "${OTHER:-${ROOT}/x y}_$n"); done\n',
        [(1, "/d/x y_1"), (2, "/d/x y_2")],
    ),
    "a string that grows": (
        'TRAIN_DATA_PATH="${TRAIN_DATA_PATH} $((2 + 3)) a"\nTRAIN_DATA_PATH+=" 4 b"\necho noise\nfalse\n',
        [(5, "a"), (4, "b")],
    ),
    "a leading flag": ("TRAIN_DATA_PATH=(--data-path $((1 + 1)) a)\n", [(2, "a")]),
}


@needs_sandbox
@pytest.mark.parametrize("name", LISTS)
def test_lists_that_compute_are_what_bash_makes_of_them(name, tmp_path):
    text, expected = LISTS[name]
    path = tmp_path / "list.sh"
    path.write_text(text)
    entries = evaluate_shell_list(path)
    assert [(entry.tokens, entry.prefix) for entry in entries] == expected
    script = f"source '{path}' >/dev/null; printf '%s ' \"${{TRAIN_DATA_PATH[@]}}\""
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert " ".join(words).replace("--data-path ", "") == " ".join(f"{n} {prefix}" for n, prefix in expected)


@needs_sandbox
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("echo > {folder}/new", 1),
        ("rm -f {folder}/kept", 1),
        ("echo x > /dev/tcp/127.0.0.1/{port}", 1),
        ("kill -9 {pid}", 1),
        ("ls /run/* ", 2),
        ("mount -o remount,rw /", None),
        ("test $(id -u) != 0", 0),
    ],
)
def test_the_sandbox_writes_nothing_reaches_nobody_and_ends_nothing(command, code, tmp_path):
    import socket

    (tmp_path / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = {"folder": tmp_path, "port": server.getsockname()[1], "pid": os.getpid()}
        done = run_in_sandbox(["bash", "--norc", "-c", command.format(**words)], ENVIRONMENT, 5)
    assert done.returncode == code if code is not None else done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@needs_sandbox
def test_a_program_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluated, "_SECONDS", -4)  # one second, with what starting takes
    path = tmp_path / "list.sh"
    path.write_text("TRAIN_DATA_PATH=(5 a)\nsleep 77.125\n")
    with pytest.raises(DataError, match="A list is needed, not a program"):
        evaluate_shell_list(path)
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 77.125" not in found


@needs_sandbox
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=(5 a)\nB=(6 b)\n", "assigns A, B. One list is needed. Name its variable with --array"),
        ("echo hello\n", "assigns no array"),
        ("TRAIN_DATA_PATH=(5 $ROOT_NOT_SET/a)\n", "ROOT_NOT_SET: unbound variable"),
        ("TRAIN_DATA_PATH=(5 a\n", "bash leaves nothing in TRAIN_DATA_PATH"),
        ("TRAIN_DATA_PATH=(5 a 6)\n", "'6' is left over"),
        ("TRAIN_DATA_PATH=($(no_such_command 5) 6 a)\n", "bash says: .*no_such_command"),
        ("exit 0\nTRAIN_DATA_PATH=(5 a)\n", "bash leaves nothing in TRAIN_DATA_PATH"),
    ],
)
def test_what_bash_complains_of_is_told(text, message, tmp_path):
    path = tmp_path / "list.sh"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        evaluate_shell_list(path)


def convert(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["blend", "convert", *map(str, words)])
    return left.value.code or 0


@needs_sandbox
def test_the_verb_evaluates_on_demand_only_and_sees_exported_variables_that_the_list_names(
    tmp_path, capsys, monkeypatch
):
    path = tmp_path / "list.sh"
    path.write_text("EN=(5 en)\nJA=(6 $CPT_ROOT/ja)\n")
    monkeypatch.setenv("CPT_ROOT", "/data")
    assert convert(path, "--to", "weights") == 2
    assert "a second array" in (error := capsys.readouterr().err)
    assert "Or let bash evaluate the list, in a sandbox: --evaluate-shell" in error
    assert convert(path, "--to", "weights", "--evaluate-shell", "--array", "JA") == 0
    assert capsys.readouterr().out == "6 /data/ja\n"
    assert convert(path, "--to", "weights", "--array", "JA") == 2
    assert "needs --evaluate-shell" in capsys.readouterr().err


def test_without_a_sandbox_it_is_refused_and_the_one_liner_gives_the_list(tmp_path, monkeypatch):
    def refuse(*_):
        raise SandboxError("no namespaces for users here: Operation not permitted")

    monkeypatch.setattr(evaluated, "run_in_sandbox", refuse)
    path = tmp_path / "my list.sh"
    path.write_text("EN=(5 en)\nTRAIN_DATA_PATH=(${EN[@]} 6 b)\n")
    with pytest.raises(DataError, match="cannot be evaluated safely on this machine") as raised:
        evaluate_shell_list(path)
    command = str(raised.value).partition("trust the file: ")[2].partition(" > list.sh")[0]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    (tmp_path / "list.sh").write_text(done.stdout)
    assert convert(tmp_path / "list.sh", "--to", "yaml", "--output", tmp_path / "list.yaml") == 0
    entries = read_data_list(tmp_path / "list.yaml")
    assert [(entry.tokens, entry.prefix) for entry in entries] == [(5, "en"), (6, "b")]
