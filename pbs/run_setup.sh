#!/usr/bin/env bash
# Build the environment as a job, for sites whose login nodes may not compile.
# Usage: pbs/run_setup.sh TARGET_DIR [options of installers/install.sh] [-- options of qsub]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "$here/../installers/run_setup.sh" "$@"
