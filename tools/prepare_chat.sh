#!/usr/bin/env bash
# Turn conversations into token shards with masks of what the assistant says, all cores, restartable.
# Usage: tools/prepare_chat.sh INPUT TOKENIZER OUTPUT_PREFIX [options of megatron-cpt data prepare-chat, such as --pack 8192]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 3 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt data prepare-chat --input "$1" --tokenizer "$2" --output-prefix "$3" "${@:4}"
