#!/usr/bin/env bash
# Installs megatron-cpt into a folder: installers/install.sh TARGET_DIR [--profile NAME] ... (see --help).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$here/find_python.sh")
exec "$python" "$here/install.py" "$@"
