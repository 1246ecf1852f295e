#!/usr/bin/env bash
# Queue every stage from documents to report that is missing: tokenize, build-index, convert, train, convert, evaluate.
# Usage: slurm/run_pipeline.sh TASK_DIR PARAM_NAME DATASET_SIZE NUM_NODES [options of megatron-cpt submit pipeline, such as --chain 3]
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
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
site="${MEGATRON_CPT_SITE:-$root/slurm/sites/leonardo.yaml}"
exec "$python" -m megatron_cpt submit pipeline --site "$site" --task "$task" --params "$params" --size "$size" \
  "$@" "launch.nodes=$nodes"
