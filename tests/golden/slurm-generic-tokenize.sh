#!/usr/bin/env bash
#SBATCH --job-name=ja-tokenize
#SBATCH --account=my-project
#SBATCH --partition=my-queue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --array=0-7
#SBATCH --no-requeue
#SBATCH --output=/site/cpt/runs/ja/8b/50B/main/logs/tokenize-D1-20260102T030405/job.out
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=0
set -euo pipefail
cd /site/cpt
umask 022
exec /site/cpt/env/bin/python -m megatron_cpt.launch.node.supervisor \
    --run /site/cpt/runs/ja/8b/50B/main \
    --stage tokenize \
    --log-dir /site/cpt/runs/ja/8b/50B/main/logs/tokenize-D1-20260102T030405 \
    --num-array-tasks 8 \
    -- \
    /site/cpt/env/bin/python -m megatron_cpt tokenize \
    --input data/D1 \
    --shard '{array_index}/{num_array_tasks}'
