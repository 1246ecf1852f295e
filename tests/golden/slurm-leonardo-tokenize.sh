#!/usr/bin/env bash
#SBATCH --job-name=ja-tokenize
#SBATCH --account=my-project
#SBATCH --partition=lrd_all_serial
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --array=0-7
#SBATCH --no-requeue
#SBATCH --output=/site/cpt/runs/ja/8b/50B/main/logs/tokenize-D1-20260102T030405/job.out
#SBATCH --open-mode=append
#SBATCH --cpus-per-task=4
set -euo pipefail
cd /site/cpt
umask 027
export NCCL_IB_TIMEOUT=22
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export HF_HUB_OFFLINE=1
exec /site/cpt/env/bin/python -m megatron_cpt.launch.node.supervisor \
    --run /site/cpt/runs/ja/8b/50B/main \
    --stage tokenize \
    --log-dir /site/cpt/runs/ja/8b/50B/main/logs/tokenize-D1-20260102T030405 \
    --num-array-tasks 8 \
    -- \
    /site/cpt/env/bin/python -m megatron_cpt tokenize \
    --input data/D1 \
    --shard '{array_index}/{num_array_tasks}'
