#!/usr/bin/env bash
# Build the environment as a job, for sites whose login nodes may not compile.
# Usage: slurm/run_setup.sh TARGET_DIR [options of installers/install.sh] [-- options of sbatch]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "$here/../installers/run_setup.sh" "$@"
