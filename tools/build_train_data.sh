#!/usr/bin/env bash
# List a tokenized tree with exact token counts; an incomplete shard is refused by name.
# Usage: tools/build_train_data.sh TOKENIZED_DIR [OUTPUT] [--overwrite]   (default output: train_data.all.sh)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 1 || $# -gt 3 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
folder="$1" output=train_data.all.sh
shift
[[ $# -gt 0 && "$1" != --* ]] && { output="$1"; shift; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt blend list "$folder" --format llm-jp --output "$output" "$@"
