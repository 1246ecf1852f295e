"""Install megatron-cpt into TARGET_DIR: environment, record of what was installed, verification.

    installers/install.sh TARGET_DIR [--profile NAME] [--download-only | --offline] [--bundle DIR] [--no-verify]

Writes TARGET_DIR/venv and TARGET_DIR/environment.json. Run it again after an interruption: it continues. For nodes
without internet: --download-only on a login node fills TARGET_DIR/bundle, --offline installs from it. Standard library
only, because it runs before the environment exists.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import REPOSITORY, build, create_venv, exclusive, exit_code, install_wheels, pip_command, run_pip, say
from profiles import REQUIREMENTS, InstallError, Profile, load_profile, load_profiles

NEEDED_GIB = 8
"""The environment takes 6 GB, the largest archives 1 GB more while they are unpacked."""


def main() -> int:
    """Install as the arguments say."""
    parser = argparse.ArgumentParser(
        prog="installers/install.sh",
        description=__doc__,
        epilog="profiles:\n" + "\n".join(f"  {name:<12} {p.about}" for name, p in load_profiles().items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=Path, metavar="TARGET_DIR", help="folder to install into; made if missing")
    parser.add_argument("--profile", default="cpu", metavar="NAME", help="see below (cpu)")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--download-only", action="store_true", help="fill the bundle, install nothing for use")
    sources.add_argument("--offline", action="store_true", help="install from the bundle, ask no index")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the bundle's folder (TARGET_DIR/bundle)")
    parser.add_argument("--no-verify", action="store_true", help="leave out the verification (about a minute)")
    return exit_code(lambda: install(parser.parse_args()))


def install(arguments: argparse.Namespace) -> None:
    """Download or install, record, verify.

    Raises: InstallError with the reason and the remedy.
    """
    profile = load_profile(arguments.profile)
    target: Path = arguments.target.resolve()
    bundle = (arguments.bundle or target / "bundle").resolve()
    target.mkdir(parents=True, exist_ok=True)
    check_space(target)
    if arguments.download_only:
        download(target, bundle, profile)
        return
    if arguments.offline and not any(bundle.glob("*.whl")):
        raise InstallError(
            f"{bundle}: no bundle. Make it where there is internet: install.sh {target} --download-only."
        )
    venv = target / "venv"
    build(venv, profile, bundle if arguments.offline else None)
    record = environment_record(venv, arguments.profile)
    (target / "environment.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(f"{target / 'environment.json'}: {len(record['packages'])} packages recorded")
    if not arguments.no_verify:
        verify(venv)
    say(f"Ready. Activate it with: source {venv}/bin/activate")


def check_space(target: Path) -> None:
    """Raises: InstallError when the target's disk cannot hold an environment."""
    free_gib = shutil.disk_usage(target).free / 2**30
    if free_gib < NEEDED_GIB and not (target / "venv").exists():
        raise InstallError(f"{target}: {free_gib:.1f} GiB free. {NEEDED_GIB} GiB are needed. Choose another disk.")


def download(target: Path, bundle: Path, profile: Profile) -> None:
    """Fill `bundle` with the profile's wheels, and with its source archives.

    pip asks a source archive for its name by running its setup, and Transformer Engine's needs torch: so the wheels
    are installed first where there are source archives.
    """
    venv = target / "venv"
    with exclusive(target):
        create_venv(venv, system_packages=profile.system_torch)
        requirements = venv / "requirements.txt"
        requirements.write_text(profile.wheels_text())
        pip = [*pip_command(venv), "download", "--require-hashes", "--no-deps", "--dest", str(bundle)]
        run_pip([*pip, "-r", str(requirements)], venv, f"downloading to {bundle}")
        if profile.source:
            install_wheels(venv, profile, bundle)
            locked = [argument for name in profile.source for argument in ("-r", str(REQUIREMENTS / name))]
            run_pip([*pip, "--no-build-isolation", *locked], venv, f"downloading source archives to {bundle}")
    size = sum(file.stat().st_size for file in bundle.iterdir())
    say(f"{bundle}: {sum(1 for _ in bundle.iterdir())} files, {size / 1e9:.1f} GB. Next: install.sh {target} --offline")


def environment_record(venv: Path, profile: str) -> dict[str, Any]:
    """Return what was installed and on what, for the target's environment.json."""
    listed = output([*pip_command(venv), "list", "--format", "json", "--disable-pip-version-check"])
    return {
        "installed": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "profile": profile,
        "python": sys.version,
        "platform": platform.platform(),
        "glibc": " ".join(platform.libc_ver()),
        "revision": output(["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]),
        "modules": os.environ.get("LOADEDMODULES", ""),
        "gpus": output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines(),
        "packages": {package["name"]: package["version"] for package in json.loads(listed or "[]")},
    }


def output(command: list[str]) -> str:
    """Return what a command prints, or nothing when it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def verify(venv: Path) -> None:
    """Run `megatron-cpt doctor --deep` in the environment.

    Raises: InstallError when it finds a problem.
    """
    say("verifying: imports, versions, a kernel, an all-reduce, a tokenization, a training step")
    if subprocess.run([str(venv / "bin" / "python"), "-m", "megatron_cpt", "doctor", "--deep"]).returncode:
        raise InstallError("The installation is there but does not work as it should: see the lines above.")


if __name__ == "__main__":
    sys.exit(main())
