#!/usr/bin/env bash
# Push a Hugging Face model folder to the Hub, weight files of at most 2 GB; --dry-run says what would be sent.
# Usage: tools/push_to_hub.sh FOLDER OWNER/NAME [options of megatron-cpt hub push, such as --private --dry-run]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 2 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt hub push "$1" --repo "$2" "${@:3}"
