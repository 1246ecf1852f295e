#!/usr/bin/env bash
# Group the many small document files of each folder into larger ones, without breaking a line.
# Usage: tools/merge_files.sh INPUT OUTPUT_DIR [options of megatron-cpt data merge-files, such as --target-bytes 2B]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 2 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt data merge-files --input "$1" --output-dir "$2" "${@:3}"
