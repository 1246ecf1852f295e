#!/usr/bin/env bash
# Convert a run's newest good checkpoint to <run>/checkpoints_hf/iter_NNNNNNN, on a CPU.
# Usage: tools/convert_latest.sh TASK_DIR PARAM_NAME DATASET_SIZE [options of megatron-cpt convert latest, such as --variant NAME]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 3 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
task="$1" params="$2" size="$3"
shift 3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt convert latest --task "$task" --params "$params" --size "$size" "$@"
