#!/usr/bin/env bash
# Queue tokenizing of a task's corpora, what is missing of it; --array-tasks N for folders of shards.
# Usage: slurm/run_tokenize.sh TASK_DIR PARAM_NAME DATASET_SIZE [options of megatron-cpt submit pipeline]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ $# -lt 3 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
exec "$here/run_pipeline.sh" "$1" "$2" "$3" 1 --only tokenize "${@:4}"
