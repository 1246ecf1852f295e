#!/usr/bin/env bash
# Rescale a list of available tokens to a budget by rules per corpus or path pattern.
# Usage: tools/update_train_data.sh SIZE [LIST [OUTPUT]] [RULES]
#   SIZE: 50B, 80B, 100B, 300B, any; LIST: train_data.all.sh; OUTPUT: train_data_SIZE.sh
#   RULES: --ratio flan=0.5 --ratio '*=1', --share, --epochs, --weight, --base ... (megatron-cpt blend rescale --help)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 1 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
size="$1"
shift
list=train_data.all.sh output="train_data_${size}.sh"
[[ $# -gt 0 && "$1" != --* ]] && { list="$1"; shift; }
[[ $# -gt 0 && "$1" != --* ]] && { output="$1"; shift; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt blend rescale "$list" "$size" --output "$output" "$@"
