"""start a run on this machine, PBS or Slurm, after checking everything that can be checked beforehand

The scheduler is `launch.scheduler`: local (torchrun on this machine, the default), pbs or slurm (set by a site file).
Queue and account come from --queue and --account, MEGATRON_CPT_QUEUE and MEGATRON_CPT_ACCOUNT, or the site file.

  train      one stage; the same command again continues it. --chain N lines up N jobs of one walltime each
  pipeline   tokenize, build-index, convert in, train, convert out, evaluate, report: the missing stages
  sweep      a small grid of settings, each point a run of its own, and one comparison: the missing points
  evaluate   a job per kept checkpoint: bits per byte on the held-out texts, or lm-evaluation-harness
  lr-find    the learning-rate range test, on every rank that training would have
  job        any other verb as a job on one node, with a stage's resources: CPU preprocessing, publishing; with --ranks on
             every rank that training would have

Example:
  megatron-cpt submit train --task tasks/demo --params demo-5m --size 300K --variant base launch.gpus_per_node=2
  megatron-cpt submit sweep --grid replay=0.05,0.25 --grid optimizer.lr=1e-3,2e-3 --task tasks/demo --params demo-5m \
      --size 300K --variant replay
  megatron-cpt submit pipeline --task tasks/demo --params demo-5m --size 300K --variant replay --soup-last 3
  megatron-cpt submit evaluate --task tasks/demo --params demo-5m --size 300K --variant replay
  megatron-cpt submit lr-find --task tasks/demo --params demo-5m --size 300K --variant base --lr-min 1e-5 --lr-max 1e-2
  megatron-cpt submit job --name dedup --command 'data dedup ja=corpus/ja --output clean' --task tasks/ja --params 8b --size 50B
  megatron-cpt submit train --site leonardo --account MINE --chain 3 --dry-run --task tasks/ja --params 8b --size 50B
"""

import argparse
import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_cpt.launch.submission.chain import Submitted
    from megatron_cpt.launch.submission.submit import Submission


logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one sub-command per stage."""
    # yaml is not needed to list the verbs
    from megatron_cpt.config.loading.resolve import add_run_arguments
    from megatron_cpt.launch.submission.aurora_variables import add_variable_arguments
    from megatron_cpt.verbs.lr_find import add_range_arguments

    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    train = stages.add_parser("train", help="train one stage, or continue it from its last checkpoint")
    train.add_argument("--chain", type=int, metavar="N", help="N jobs, each continuing the one before (1)")
    train.add_argument("--max-failures", type=int, metavar="K", help="links without progress that break it (2)")
    add_variable_arguments(train)
    pipeline = stages.add_parser("pipeline", help="all stages from documents to report, what is missing of them")
    pipeline.add_argument("--chain", type=int, metavar="N", help="jobs of the training stage (1)")
    pipeline.add_argument("--max-failures", type=int, metavar="K", help="links without progress (2)")
    pipeline.add_argument("--array-tasks", type=int, metavar="N", help="tokenize each corpus in N tasks (1)")
    pipeline.add_argument(
        "--soup-last", type=int, default=0, metavar="K", help="average the last K exports (0: no soup)"
    )
    pipeline.add_argument(
        "--only", default="", metavar="STAGE[,STAGE]", help="of the graph only these, such as tokenize"
    )
    sweep = stages.add_parser("sweep", help="a grid of settings, each point a run of its own, and one comparison")
    sweep.add_argument(
        "--grid", action="append", required=True, metavar="KEY=V1,V2", help="setting and values, or replay=SHARE,SHARE"
    )
    sweep.add_argument("--old", action="append", default=[], metavar="CORPUS", help="data not to forget")
    sweep.add_argument("--name", default="sweep", metavar="NAME", help="the sweep's folder is VARIANT+NAME (sweep)")
    evaluate = stages.add_parser("evaluate", help="a job per kept checkpoint: bits per byte, or the harness")
    evaluate.add_argument("--harness", default="", metavar="TASK,TASK", help="tasks of lm-evaluation-harness instead")
    evaluate.add_argument("--every", type=int, metavar="N", help="only multiples of N iterations, and the last one")
    lr_find = stages.add_parser("lr-find", help="the learning-rate range test, on every rank that training would have")
    add_range_arguments(lr_find)
    job = stages.add_parser("job", help="any other verb as a job of its own, on one node or on every rank")
    job.add_argument("--ranks", action="store_true", help="on every rank that training would have, with its resources")
    job.add_argument("--command", required=True, help="the verb and its arguments, quoted: 'data prepare-chat ...'")
    job.add_argument("--name", required=True, help="of the job, in the ledger and the logs")
    job.add_argument("--resources", default="tokenize", metavar="STAGE", help="of the site file's stages (tokenize)")
    for stage in (train, pipeline, sweep, evaluate, lr_find, job):
        stage.add_argument("--depend", metavar="KIND:ID[:ID]", help="wait for jobs, such as afterok:123:124")
        stage.add_argument("--dry-run", action="store_true", help="print scripts and commands; write and queue nothing")
        stage.add_argument("--queue", metavar="NAME", help="queue or partition")
        stage.add_argument("--account", metavar="NAME", help="group, project or account")
        add_run_arguments(stage)


def run(arguments: argparse.Namespace) -> int:
    """Submit the stage; return its exit code (local) or 0 once it is queued."""
    from megatron_cpt.config.loading.resolve import load_from_arguments
    from megatron_cpt.launch.scheduler.site import read_site
    from megatron_cpt.launch.submission.aurora_variables import with_variables
    from megatron_cpt.launch.submission.executor import executor_of
    from megatron_cpt.launch.submission.submit import Submission
    from megatron_cpt.verbs.run_arguments import load_planned, load_run

    if arguments.stage == "train" and (
        arguments.from_environment or arguments.finetune or arguments.universal_checkpoint
    ):
        arguments.overrides = with_variables(arguments, os.environ if arguments.from_environment else {})
    # what prepares the tokens runs before a length in epochs can be counted
    stated, estimate = load_from_arguments(arguments), ""
    loaded = stated
    if arguments.stage in ("train", "pipeline"):
        loaded, estimate = load_planned(arguments)
    elif arguments.stage != "job":
        loaded = load_run(arguments)
    if estimate:
        logger.info("length: %s", estimate)
    submission = Submission(
        loaded=loaded,
        site=read_site(arguments.site, queue=arguments.queue, account=arguments.account),
        run_arguments=tuple(run_arguments(arguments)),
        depend=arguments.depend,
        dry_run=arguments.dry_run,
        in_epochs=stated.config.training.train_epochs is not None,
        estimate=estimate,
    )
    names = ("depend", "queue", "account", "chain", "array_tasks", "max_failures")
    executor_of(submission).check_options(
        {f"--{name.replace('_', '-')}": getattr(arguments, name, None) for name in names}
    )
    submitted = _STAGES[arguments.stage](submission, arguments)
    if submission.scheduler != "local":
        sys.stdout.write("".join(f"{job}\n" for job in submitted.ids))
    return submitted.exit_code


def _train(submission: "Submission", arguments: argparse.Namespace) -> "Submitted":
    """Start training."""
    from megatron_cpt.launch.submission.chain import submit_training

    return submit_training(submission, **_chain_options(arguments))


def _pipeline(submission: "Submission", arguments: argparse.Namespace) -> "Submitted":
    """Start the graph."""
    from megatron_cpt.launch.submission.pipeline import submit_pipeline

    return submit_pipeline(
        submission,
        num_array_tasks=1 if arguments.array_tasks is None else arguments.array_tasks,
        soup_last=arguments.soup_last,
        only=[name for name in arguments.only.split(",") if name],
        **_chain_options(arguments),
    )


def _chain_options(arguments: argparse.Namespace) -> dict[str, int]:
    given = {"num_links": arguments.chain, "max_failures": arguments.max_failures}
    return {name: value for name, value in given.items() if value is not None}


def _sweep(submission: "Submission", arguments: argparse.Namespace) -> "Submitted":
    """Start a grid: every point is loaded, and so checked, before anything begins."""
    import dataclasses

    from megatron_cpt.launch.submission.grid import grid_points, old_corpora, parse_grid
    from megatron_cpt.launch.submission.sweep import Sweep, submit_sweep, sweep_submission
    from megatron_cpt.run.variants import labelled
    from megatron_cpt.verbs.run_arguments import load_run

    config = submission.loaded.config
    old = old_corpora(arguments, config)
    points, submissions = grid_points(parse_grid(arguments.grid), config, old), []
    for point in points:
        settings = [f"{key}={value}" for key, value in point.settings.items()]
        own = argparse.Namespace(**vars(arguments))
        own.variant, own.overrides = labelled(arguments.variant, point.label), [*arguments.overrides, *settings]
        loaded, words = load_run(own), tuple(run_arguments(own))
        submissions.append(dataclasses.replace(submission, loaded=loaded, run_arguments=words))
    whole = sweep_submission(submission, arguments.name)
    return submit_sweep(Sweep(submission=whole, points=points, submissions=submissions, old=old))


def _lr_find(submission: "Submission", arguments: argparse.Namespace) -> "Submitted":
    """Start the range test, with the same checks as for training."""
    from megatron_cpt.config.checks.lr_find import check_range_test
    from megatron_cpt.launch.submission.tool_job import submit_tool_job
    from megatron_cpt.launch.submission.validate import training_problems

    config = submission.loaded.config
    check_range_test(config.training, arguments.lr_min, arguments.lr_max, arguments.iterations)
    problems = training_problems(submission.loaded, submission.run)
    options = [
        "--lr-min",
        repr(arguments.lr_min),
        "--lr-max",
        repr(arguments.lr_max),
        "--iterations",
        str(arguments.iterations),
    ]
    command = shlex.join(["lr-find", *options, *submission.run_arguments])
    return submit_tool_job(submission, "lr-find", command, "train", on_ranks=True, problems=problems)


def _job(submission: "Submission", arguments: argparse.Namespace) -> "Submitted":
    """Start one verb as a job of its own."""
    from megatron_cpt.launch.submission.tool_job import submit_tool_job

    return submit_tool_job(submission, arguments.name, arguments.command, arguments.resources, on_ranks=arguments.ranks)


def _evaluate(submission: "Submission", arguments: argparse.Namespace) -> "Submitted":
    """Measure every kept checkpoint."""
    from megatron_cpt.launch.submission.checkpoint_jobs import checkpoint_stages, submit_checkpoint_jobs

    stages = checkpoint_stages(submission, [name for name in arguments.harness.split(",") if name], arguments.every)
    return submit_checkpoint_jobs(submission, stages)


_STAGES = {
    "train": _train,
    "pipeline": _pipeline,
    "sweep": _sweep,
    "evaluate": _evaluate,
    "lr-find": _lr_find,
    "job": _job,
}


def run_arguments(arguments: argparse.Namespace) -> list[str]:
    """Return the command-line arguments that make another verb load the same configuration."""
    from megatron_cpt.config.loading.naming import is_run_directory

    if is_run_directory(arguments.task):
        return ["--task", str(arguments.task), *arguments.overrides]
    options = ["--task", str(arguments.task), "--params", arguments.params, "--size", arguments.size]
    options += ["--variant", arguments.variant]
    if arguments.site:
        options += ["--site", str(arguments.site)]
    return [*options, *arguments.overrides]
