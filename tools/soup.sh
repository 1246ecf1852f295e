#!/usr/bin/env bash
# Average (or otherwise merge) models: a run's last checkpoints, listed iterations, or Hugging Face folders.
# Usage: tools/soup.sh [options of megatron-cpt soup, such as --task DIR --params NAME --size S --last 3 --output DIR]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 1 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt soup "$@"
