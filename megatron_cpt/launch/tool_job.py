"""A job of its own for any verb: what runs once, on one node, before or after a run, such as preparing chat data on CPUs.

Its resources are those of a stage of the site file (`stages.tokenize`: on most sites a CPU queue), its ledger and logs the run's.
"""

import logging
import os
import shlex
import subprocess
import sys

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch import scheduler as queue
from megatron_cpt.launch.job import parse_dependency
from megatron_cpt.launch.lock import run_lock
from megatron_cpt.launch.processes import process_environment
from megatron_cpt.launch.render import render_job
from megatron_cpt.launch.submit import Submission, live_jobs, show_dry_run, stage_job, submit_stage
from megatron_cpt.launch.validate import check_site

logger = logging.getLogger(__name__)


def command_words(command: str) -> list[str]:
    """Return the arguments of `megatron-cpt` in a command as a user writes it, with or without the program's name.

    Raises: LaunchError when nothing is left or a quote is open.
    """
    try:
        words = shlex.split(command)
    except ValueError as problem:
        raise LaunchError(f"--command: {command!r}: {problem}. Quote it as a shell would.") from None
    words = words[1:] if words[:1] == ["megatron-cpt"] else words
    if not words:
        raise LaunchError("--command: no verb. Give one with its arguments, such as 'data prepare-chat --input ...'.")
    return words


def submit_tool_job(submission: Submission, name: str, command: str, resources: str = "tokenize") -> str | None:
    """Queue `megatron-cpt COMMAND` as the job `name`; return its id, none in a dry run.

    Raises: LaunchError when the site lacks something or a job of that name is queued or running.
    """
    words = command_words(command)
    check_site(submission.loaded.config, submission.site)
    dependencies = parse_dependency(submission.depend, submission.scheduler) if submission.depend else ()
    if submission.dry_run:
        job = stage_job(submission, resources, words, name=name)
        script = submission.run.jobs / f"{job.log_dir.name}.sh"
        text = render_job(job, submission.scheduler)
        show_dry_run(script, text, queue.submit_command(submission.scheduler, script, dependencies))
        return None
    queue.check_commands(submission.scheduler)
    queue.check_dependencies(submission.scheduler, dependencies)
    with run_lock(submission.run.jobs / "submit.lock", "another submission"):
        alive = live_jobs(submission, resources, name)
        if alive:
            raise LaunchError(f"{name}: job {alive[-1]} is queued or running. Wait for it, or give another --name.")
        return submit_stage(submission, resources, words, dependencies=dependencies, name=name)


def run_tool_job(submission: Submission, command: str) -> int:
    """Run `megatron-cpt COMMAND` on this machine; return its exit code."""
    words = command_words(command)
    if submission.dry_run:
        sys.stdout.write(f"$ megatron-cpt {shlex.join(words)}\n")
        return 0
    own = process_environment(os.environ, 1)
    environment = {**own, **os.environ, "PYTHONPATH": own["PYTHONPATH"]}
    code = subprocess.run([sys.executable, "-m", "megatron_cpt", *words], env=environment, check=False).returncode
    return code if code >= 0 else 128 - code
