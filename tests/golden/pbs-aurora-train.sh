#!/usr/bin/env bash
#PBS -N ja-train
#PBS -P my-project
#PBS -q prod
#PBS -l select=2
#PBS -l walltime=24:00:00
#PBS -W umask=027
#PBS -j oe
#PBS -k oed
#PBS -o /site/cpt/runs/ja/8b/50B/main/logs/train-20260102T030405-001/job.out
#PBS -m n
#PBS -l filesystems=home:flare
#PBS -l place=scatter
set -euo pipefail
cd /site/cpt
umask 027
set +u
module load frameworks
set -u
export FI_CXI_DEFAULT_CQ_SIZE=1048576
export FI_MR_CACHE_MONITOR=userfaultfd
export CCL_ATL_TRANSPORT=mpi
exec /site/cpt/env/bin/python -m megatron_cpt.launch.node.supervisor \
    --run /site/cpt/runs/ja/8b/50B/main \
    --stage train \
    --log-dir /site/cpt/runs/ja/8b/50B/main/logs/train-20260102T030405-001 \
    --launcher 'mpiexec -n 24 --ppn 12 --hostfile %hostfile% --cpu-bind none' \
    --processes rank \
    --nodes 2 \
    --gpus-per-node 12 \
    --chain 20260102T030405 \
    --train-iters 1000 \
    --max-failures 2 \
    --must-finish \
    --forward FI_CXI_DEFAULT_CQ_SIZE,FI_MR_CACHE_MONITOR,CCL_ATL_TRANSPORT \
    -- \
    /site/cpt/env/bin/python -m megatron_cpt train \
    --task tasks/ja \
    --params 8b \
    --size 50B \
    --variant main
