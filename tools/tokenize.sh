#!/usr/bin/env bash
# Tokenize a folder of documents to .bin/.idx files, all cores, restartable.
# Usage: tools/tokenize.sh INPUT TOKENIZER OUTPUT_DIR [options of megatron-cpt tokenize, such as --shard-tokens 500M]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 3 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt tokenize --input "$1" --tokenizer "$2" --output-dir "$3" "${@:4}"
