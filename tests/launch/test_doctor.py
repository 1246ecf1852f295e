"""The doctor: which facts are a problem, and what it advises."""

import socket
import subprocess
import sys

import pytest

from megatron_cpt.launch import doctor


def levels(findings):
    return {finding.what: finding.level for finding in findings}


def test_a_missing_package_is_a_problem_but_a_missing_accelerator_is_not():
    findings = doctor.check_packages({"torch": "2.13.0", "gigatoken": "0.10.0"}, {})
    assert levels(findings) == {"torch": "problem", "gigatoken": "note"}


def test_another_minor_version_is_a_warning_and_another_patch_a_note():
    expected = {"torch": "2.13.0", "numpy": "2.5.5"}
    findings = doctor.check_packages(expected, {"torch": "2.12.1", "numpy": "2.5.4"})
    assert levels(findings) == {"torch": "warning", "numpy": "note"}


def test_bounds_stand_in_for_the_lock_file_where_there_is_no_checkout():
    findings = doctor.check_packages({"transformers": "<6,>=5"}, {"transformers": "4.57.0"})
    assert levels(findings) == {"transformers": "problem"}
    assert levels(doctor.check_packages({"transformers": "<6,>=5"}, {"transformers": "5.1.0"})) == {"packages": "ok"}


def test_names_are_compared_as_package_indexes_do():
    assert levels(doctor.check_packages({"typing-extensions": "4.16.0"}, {"typing-extensions": "4.16.0"})) == {
        "packages": "ok"
    }


def test_this_environment_has_the_locked_versions():
    expected = doctor.locked_versions(doctor.LOCK_FILE)
    assert len(expected) > 50
    assert levels(doctor.check_packages(expected, doctor.installed_versions())) == {"packages": "ok"}


@pytest.mark.parametrize(
    ("driver", "cuda", "level"),
    [
        (None, "13.0.96", "note"),
        ("550.54.15, NVIDIA A100", "13.0.96", "problem"),
        ("580.82.07, NVIDIA H200", "13.0.96", "ok"),
        ("580.82.07, NVIDIA H200", None, "warning"),
    ],
)
def test_the_driver_has_to_fit_torchs_cuda(driver, cuda, level):
    assert doctor.check_gpu(driver, cuda)[0].level == level


def test_an_old_python_is_a_problem():
    assert doctor.check_python((3, 11)).level == "problem"
    assert doctor.check_python((3, 13)).level == "ok"


def test_a_host_name_that_cannot_be_looked_up_is_a_warning(monkeypatch):
    def fail(name):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", fail)
    (finding,) = doctor.check_host("node17")
    assert finding.level == "warning"
    assert "node17" in finding.found


def test_a_folder_on_pythonpath_that_shadows_torch_is_named(tmp_path):
    (tmp_path / "torch").mkdir()
    (finding,) = doctor.check_shadowing({"PYTHONPATH": f"{tmp_path}:/nowhere"})
    assert str(tmp_path) in finding.found


def test_libraries_of_a_module_that_come_before_torchs_are_noted(tmp_path):
    (tmp_path / "libnccl.so.2").touch()
    (finding,) = doctor.check_shadowing({"LD_LIBRARY_PATH": str(tmp_path)})
    assert "libnccl.so.2" in finding.found


def test_a_nearly_full_disk_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "FREE_BYTES", 2**80)
    assert doctor.check_disk(tmp_path / "runs" / "not made yet").level == "warning"


def test_a_small_limit_of_open_files_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 1024))
    assert levels(doctor.check_limits())["open files"] == "warning"


def test_the_report_shows_remedies_and_counts():
    text = doctor.report(
        [doctor.Finding("problem", "disk", "full", "free some"), doctor.Finding("ok", "python", "3.12")]
    )
    assert text.splitlines()[1].strip() == "-> free some"
    assert text.splitlines()[-1] == "1 problems, 0 warnings"


def test_the_verb_exits_1_when_a_problem_is_found(tmp_path):
    program = "from megatron_cpt.launch import doctor; doctor.LOCK_FILE = __import__('pathlib').Path({!r})\n"
    program += "from megatron_cpt.cli import main; main(['doctor'])"
    lock_file = tmp_path / "cpu.txt"
    lock_file.write_text("no-such-package==1.0 \\\n")
    answer = subprocess.run([sys.executable, "-c", program.format(str(lock_file))], capture_output=True, text=True)
    assert answer.returncode == 1, answer.stderr
    assert "problem  no-such-package" in answer.stdout
