#!/usr/bin/env bash
#PBS -N ja-train
#PBS -P my-project
#PBS -q my-queue
#PBS -l select=2:ngpus=8
#PBS -l walltime=24:00:00
#PBS -W umask=022
#PBS -j oe
#PBS -k oed
#PBS -o /site/cpt/runs/ja/8b/50B/main/logs/train-20260102T030405-001/job.out
#PBS -m n
set -euo pipefail
cd /site/cpt
umask 022
exec /site/cpt/env/bin/python -m megatron_cpt.launch.node.supervisor \
    --run /site/cpt/runs/ja/8b/50B/main \
    --stage train \
    --log-dir /site/cpt/runs/ja/8b/50B/main/logs/train-20260102T030405-001 \
    --launcher 'mpirun -n 2 --map-by ppr:1:node --hostfile %hostfile% --bind-to none' \
    --processes node \
    --nodes 2 \
    --gpus-per-node 8 \
    --chain 20260102T030405 \
    --train-iters 1000 \
    --max-failures 2 \
    --must-finish \
    -- \
    /site/cpt/env/bin/python -m megatron_cpt train \
    --task tasks/ja \
    --params 8b \
    --size 50B \
    --variant main
