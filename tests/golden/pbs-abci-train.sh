#!/usr/bin/env bash
#PBS -N ja-train
#PBS -P my-project
#PBS -q rt_HF
#PBS -l select=2
#PBS -l walltime=24:00:00
#PBS -W umask=027
#PBS -j oe
#PBS -k oed
#PBS -o /site/cpt/runs/ja/8b/50B/main/logs/train-20260102T030405-001/job.out
#PBS -m n
#PBS -v RTYPE=rt_HF
set -euo pipefail
cd /site/cpt
umask 027
set +u
# shellcheck source=/dev/null
source /etc/profile.d/modules.sh
module load cuda
module load cudnn
module load hpcx
module load nccl
set -u
export NCCL_IB_TIMEOUT=22
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
exec /site/cpt/env/bin/python -m megatron_cpt.launch.node.supervisor \
    --run /site/cpt/runs/ja/8b/50B/main \
    --stage train \
    --log-dir /site/cpt/runs/ja/8b/50B/main/logs/train-20260102T030405-001 \
    --launcher 'mpirun -n 16 --npernode 8 --hostfile %hostfile% -bind-to none -map-by slot' \
    --processes rank \
    --nodes 2 \
    --gpus-per-node 8 \
    --chain 20260102T030405 \
    --train-iters 1000 \
    --max-failures 2 \
    --must-finish \
    --forward NCCL_IB_TIMEOUT,TORCH_NCCL_ASYNC_ERROR_HANDLING \
    -- \
    /site/cpt/env/bin/python -m megatron_cpt train \
    --task tasks/ja \
    --params 8b \
    --size 50B \
    --variant main
