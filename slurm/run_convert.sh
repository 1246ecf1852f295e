#!/usr/bin/env bash
# Queue conversion of a run: its Hugging Face base model in, its kept checkpoints out.
# Usage: slurm/run_convert.sh TASK_DIR PARAM_NAME DATASET_SIZE [options of megatron-cpt submit pipeline]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ $# -lt 3 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
exec "$here/run_pipeline.sh" "$1" "$2" "$3" 1 --only convert "${@:4}"
