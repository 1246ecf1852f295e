#!/usr/bin/env bash
#PBS -N ja-tokenize
#PBS -P my-project
#PBS -q my-queue
#PBS -l select=1
#PBS -l walltime=24:00:00
#PBS -J 0-7
#PBS -W umask=022
#PBS -j oe
#PBS -k oed
#PBS -o /site/cpt/runs/ja/8b/50B/main/logs/tokenize-D1-20260102T030405/job.out
#PBS -m n
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
