#!/usr/bin/env bash
#SBATCH --job-name=ja-sweep
#SBATCH --account=my-project
#SBATCH --partition=my-queue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --array=0-1
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --output=/site/cpt/runs/ja/8b/50B/main+sweep/logs/train-20260102T030405-001/job.out
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=8
set -euo pipefail
cd /site/cpt
umask 022
exec /site/cpt/env/bin/python -m megatron_cpt.launch.node.supervisor \
    --run /site/cpt/runs/ja/8b/50B/main+sweep \
    --stage train \
    --log-dir /site/cpt/runs/ja/8b/50B/main+sweep/logs/train-20260102T030405-001 \
    --launcher 'srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1' \
    --processes node \
    --nodes 2 \
    --gpus-per-node 8 \
    --chain 20260102T030405 \
    --train-iters 1000 \
    --max-failures 2 \
    --must-finish \
    --points /site/cpt/runs/ja/8b/50B/main+sweep/jobs/points-20260102T030405.json \
    -- \
    /site/cpt/env/bin/python -m megatron_cpt train
