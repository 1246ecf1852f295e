#!/usr/bin/env bash
# Builds ./.venv for development (make venv): the pinned requirements and this package in editable mode.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(installers/find_python.sh)
exec "$python" installers/environment.py --venv .venv --profile dev
