#!/usr/bin/env bash
# Train as on Aurora: settings from environment variables, --universal-checkpoint and --finetune.
# Usage: [VARIABLE=VALUE ...] tools/train.sh --task DIR --params NAME --size S [--finetune] [options of megatron-cpt submit train]
# Variables: TRAIN_TOKENS TRAIN_ITERS GRAD_ACC_STEPS MICRO_BATCH GLOBAL_BATCH SEQ TP PP SP LR MIN_LR LR_WARMUP_FRAC LR_DECAY_STYLE DATA_FILE_LIST TOKENIZER_MODEL LOAD SAVE SAVE_INTERVAL ... (docs/migrate/auroragpt.md has all)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ $# -lt 1 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m megatron_cpt submit train --from-environment "$@"
