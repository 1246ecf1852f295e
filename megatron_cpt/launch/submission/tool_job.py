"""A job of its own for any verb, on one node or on every rank of a training job; its ledger and logs are the run's.

Once, on one node, runs what comes before or after a run, such as preparing chat data on CPUs: its resources are those of a stage
of the site file (`stages.tokenize`: on most sites a CPU queue). On every rank runs what needs the model as training lays it
out, such as `lr-find`: with the nodes, GPUs, launcher and preflight of the run's training job.
"""

import logging
import os
import shlex
import subprocess
import sys

from megatron_cpt.config.settings.derived import world_size
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node.processes import process_environment
from megatron_cpt.launch.scheduler import queue
from megatron_cpt.launch.scheduler.job import parse_dependency
from megatron_cpt.launch.scheduler.local import run_local
from megatron_cpt.launch.scheduler.render import render_job
from megatron_cpt.launch.submission.submit import Submission, live_jobs, queue_job, rank_job, show_dry_run, stage_job
from megatron_cpt.launch.submission.validate import check_site
from megatron_cpt.run.lock import run_lock

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


def submit_tool_job(
    submission: Submission, name: str, command: str, resources: str = "tokenize", *, on_ranks: bool = False
) -> str | None:
    """Queue `megatron-cpt COMMAND` as the job `name`; return its id, none in a dry run.

    With `on_ranks` it runs on every rank of a training job, whose resources it has; else once, with those of a stage.

    Raises: LaunchError when the site lacks something or a job of that name is queued or running.
    """
    words = command_words(command)
    check_site(submission.loaded.config, submission.site)
    dependencies = parse_dependency(submission.depend, submission.scheduler) if submission.depend else ()
    stage = words[0] if on_ranks else resources
    if on_ranks:
        job = rank_job(submission, stage, f"{name}-{submission.stamp}", words)
    else:
        job = stage_job(submission, stage, words, name=name)
    if submission.dry_run:
        script = submission.run.jobs / f"{job.log_dir.name}.sh"
        text = render_job(job, submission.scheduler)
        show_dry_run(script, text, queue.submit_command(submission.scheduler, script, dependencies))
        return None
    queue.check_commands(submission.scheduler)
    queue.check_dependencies(submission.scheduler, dependencies)
    with run_lock(submission.run.jobs / "submit.lock", "another submission"):
        alive = live_jobs(submission, stage, name)
        if alive:
            raise LaunchError(f"{name}: job {alive[-1]} is queued or running. Wait for it, or give another --name.")
        return queue_job(submission, job, dependencies, {"name": name})


def run_tool_job(submission: Submission, command: str, *, on_ranks: bool = False) -> int:
    """Run `megatron-cpt COMMAND` on this machine, with `on_ranks` on as many ranks as training; return its exit code."""
    words = command_words(command)
    num_ranks = world_size(submission.loaded.config)
    if on_ranks and submission.dry_run:
        sys.stdout.write(f"{num_ranks} local ranks: megatron-cpt {shlex.join(words)}\n")
        return 0
    if on_ranks:
        program = ("-m", "megatron_cpt", words[0])
        return run_local(submission.run, words[1:], num_ranks=num_ranks, stage=words[0], program=program)
    if submission.dry_run:
        sys.stdout.write(f"$ megatron-cpt {shlex.join(words)}\n")
        return 0
    own = process_environment(os.environ, 1)
    environment = {**own, **os.environ, "PYTHONPATH": own["PYTHONPATH"]}
    code = subprocess.run([sys.executable, "-m", "megatron_cpt", *words], env=environment, check=False).returncode
    return code if code >= 0 else 128 - code
