"""start a run on this machine, PBS or Slurm, after checking everything that can be checked beforehand

The scheduler is `launch.scheduler`: local (torchrun on this machine, the default), pbs or slurm (set by a site file).
Queue and account come from --queue and --account, MEGATRON_CPT_QUEUE and MEGATRON_CPT_ACCOUNT, or the site file.

  train      one stage; the same command again continues it. --chain N lines up N jobs of one walltime each
  pipeline   tokenize, build-index, convert in, train, convert out, evaluate, report: what is missing of it

Example:
  megatron-cpt submit train --task tasks/demo --params demo-5m --size 300K --variant base launch.gpus_per_node=2
  megatron-cpt submit train --site leonardo --account MINE --chain 3 --dry-run --task tasks/ja --params 8b --size 50B
"""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one sub-command per stage."""
    from megatron_cpt.config.load import add_run_arguments  # yaml is not needed to list the verbs

    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    train = stages.add_parser("train", help="train one stage, or continue it from its last checkpoint")
    train.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each continuing the one before (1)")
    train.add_argument(
        "--max-failures", type=int, default=2, metavar="K", help="links without progress that break it (2)"
    )
    train.add_argument(
        "--from-environment", action="store_true", help="settings from Aurora's variables (TRAIN_TOKENS, LR, LOAD ...)"
    )
    train.add_argument("--universal-checkpoint", action="store_true", help="load optimizer state too (init.load=full)")
    train.add_argument("--finetune", action="store_true", help="load weights only (init.load=weights)")
    pipeline = stages.add_parser("pipeline", help="all stages from documents to report, what is missing of them")
    pipeline.add_argument("--chain", type=int, default=1, metavar="N", help="jobs of the training stage (1)")
    pipeline.add_argument("--max-failures", type=int, default=2, metavar="K", help="links without progress (2)")
    pipeline.add_argument("--array-tasks", type=int, default=1, metavar="N", help="tokenize each corpus in N tasks (1)")
    pipeline.add_argument(
        "--soup-last", type=int, default=0, metavar="K", help="average the last K exports (0: no soup)"
    )
    pipeline.add_argument(
        "--only", default="", metavar="STAGE[,STAGE]", help="of the graph only these, such as tokenize"
    )
    for stage in (train, pipeline):
        stage.add_argument("--depend", metavar="KIND:ID[:ID]", help="wait for jobs, such as afterok:123:124")
        stage.add_argument("--dry-run", action="store_true", help="print scripts and commands; write and queue nothing")
        stage.add_argument("--queue", metavar="NAME", help="queue or partition")
        stage.add_argument("--account", metavar="NAME", help="group, project or account")
        add_run_arguments(stage)


def run(arguments: argparse.Namespace) -> int:
    """Submit the stage; return its exit code (local) or 0 once it is queued."""
    from megatron_cpt.config.derived import world_size
    from megatron_cpt.config.load import load_from_arguments
    from megatron_cpt.errors import LaunchError
    from megatron_cpt.launch.aurora_variables import with_variables
    from megatron_cpt.launch.local import run_local
    from megatron_cpt.launch.pipeline import run_pipeline, submit_pipeline
    from megatron_cpt.launch.run_dir import run_dir
    from megatron_cpt.launch.site import read_site
    from megatron_cpt.launch.submit import Submission, submit_chain
    from megatron_cpt.launch.validate import check_training

    if arguments.stage == "train" and (
        arguments.from_environment or arguments.finetune or arguments.universal_checkpoint
    ):
        arguments.overrides = with_variables(arguments, os.environ if arguments.from_environment else {})
    loaded = load_from_arguments(arguments)
    config = loaded.config
    submission = Submission(
        loaded=loaded,
        site=read_site(arguments.site, queue=arguments.queue, account=arguments.account),
        run_arguments=tuple(run_arguments(arguments)),
        depend=arguments.depend,
        dry_run=arguments.dry_run,
    )
    only = [name for name in getattr(arguments, "only", "").split(",") if name]
    if config.launch.scheduler == "local":
        if arguments.depend:
            raise LaunchError(f"--depend {arguments.depend}: launch.scheduler is local. A batch scheduler is needed.")
        if arguments.stage == "pipeline":
            return run_pipeline(submission, soup_last=arguments.soup_last, only=only)
        check_training(loaded, run_dir(config))
        if arguments.dry_run:
            sys.stdout.write(
                f"{world_size(config)} local ranks: megatron-cpt train {' '.join(run_arguments(arguments))}\n"
            )
            return 0
        return run_local(
            run_dir(config),
            run_arguments(arguments),
            num_ranks=world_size(config),
            max_restarts=max(config.launch.max_restarts, arguments.chain - 1),
        )
    if arguments.stage == "pipeline":
        ids = submit_pipeline(
            submission,
            num_links=arguments.chain,
            max_failures=arguments.max_failures,
            num_array_tasks=arguments.array_tasks,
            soup_last=arguments.soup_last,
            only=only,
        )
    else:
        ids = submit_chain(submission, num_links=arguments.chain, max_failures=arguments.max_failures)
    sys.stdout.write("".join(f"{job}\n" for job in ids))
    return 0


def run_arguments(arguments: argparse.Namespace) -> list[str]:
    """Return the command-line arguments that make another verb load the same configuration."""
    options = ["--task", str(arguments.task), "--params", arguments.params, "--size", arguments.size]
    options += ["--variant", arguments.variant]
    if arguments.site:
        options += ["--site", str(arguments.site)]
    return [*options, *arguments.overrides]
