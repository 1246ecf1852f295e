#!/usr/bin/env bash
# Convert a Hugging Face folder to a Megatron checkpoint (OUTPUT/release), on a CPU.
# Usage: tools/convert_hf_to_mcore.sh HF_DIR OUTPUT [options of megatron-cpt convert hf-to-mcore, such as --verify]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 2 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt convert hf-to-mcore "$@"
