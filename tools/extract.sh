#!/usr/bin/env bash
# Decompress a tree of document files (zst, gz, xz, bz2, parquet, plain) to a mirrored tree, in parallel, resumable.
# Usage: tools/extract.sh INPUT OUTPUT_DIR [options of megatron-cpt data extract]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 2 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt data extract --input "$1" --output-dir "$2" "${@:3}"
