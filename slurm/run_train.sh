#!/usr/bin/env bash
# Queue training of one stage; the same command again continues it from its last checkpoint.
# Usage: slurm/run_train.sh TASK_DIR PARAM_NAME DATASET_SIZE NUM_NODES [DEPEND] [options of megatron-cpt submit train, such as --chain 3]
# MEGATRON_CPT_SITE names the site file (leonardo); MEGATRON_CPT_ACCOUNT and MEGATRON_CPT_QUEUE who pays and where.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 4 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
task="$1" params="$2" size="$3" nodes="$4"
shift 4
if [[ "${1:-}" == after*:* ]]; then set -- --depend "$@"; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
site="${MEGATRON_CPT_SITE:-$root/slurm/sites/leonardo.yaml}"
exec "$python" -m megatron_cpt submit train --site "$site" --task "$task" --params "$params" --size "$size" \
  "$@" "launch.nodes=$nodes"
