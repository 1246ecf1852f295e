#!/usr/bin/env bash
# Queue training of one stage behind other jobs.
# Usage: slurm/run_train_with_deps.sh TASK_DIR PARAM_NAME DATASET_SIZE NUM_NODES DEPEND [options of megatron-cpt submit train, such as --chain 3]
# DEPEND is what sbatch --dependency= takes, such as afterok:1:2. MEGATRON_CPT_SITE names the site file (leonardo).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ $# -lt 5 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi
depend="$5"
exec "$here/run_train.sh" "${@:1:4}" --depend "$depend" "${@:6}"
