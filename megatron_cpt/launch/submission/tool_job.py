"""A job of its own for any verb, on one node or on every rank of a training job; its ledger and logs are the run's.

Once, on one node, runs what comes before or after a run, such as preparing chat data on CPUs: its resources are those of a stage
of the site file (`stages.tokenize`: on most sites a CPU queue). On every rank runs what needs the model as training lays it
out, such as `lr-find`: with the nodes, GPUs, launcher and preflight of the run's training job.
"""

import shlex
from collections.abc import Sequence

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.submission.chain import Submitted
from megatron_cpt.launch.submission.executor import executor_of
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.launch.submission.work import Work
from megatron_cpt.run.lock import run_lock


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
    submission: Submission,
    name: str,
    command: str,
    resources: str = "tokenize",
    *,
    on_ranks: bool = False,
    problems: Sequence[str] = (),
) -> Submitted:
    """Run or queue `megatron-cpt COMMAND` as the job `name`.

    `problems` are errors found by the caller that prevent the job. With `on_ranks` it runs on every rank of a training
    job, whose resources it has; else once, with those of a stage.

    Raises: LaunchError when the site lacks something or a job of that name is queued or running.
    """
    words = command_words(command)
    executor = executor_of(submission)
    work = Work(name=name, stage=words[0] if on_ranks else resources, words=tuple(words), on_ranks=on_ranks)
    problems = [*executor.problems(), *problems]
    if submission.dry_run:
        executor.show(work, executor.shown_parents())
    if problems:
        raise LaunchError("\n".join(problems))
    if submission.dry_run:
        return Submitted()
    with run_lock(submission.run.jobs / "submit.lock", "another submission"):
        executor.begin()
        alive = executor.live(work.stage, name)
        if alive:
            raise LaunchError(f"{name}: job {alive[-1]} is queued or running. Wait for it, or give another --name.")
        job = executor.submit(work, executor.parents())
    code = 0 if executor.waits else executor.states([job])[job].exit_code or 0
    return Submitted(ids=(job,), exit_code=code)
