#!/usr/bin/env bash
# Prints the path of a Python 3.12 or 3.13, the ones that megatron-core 0.19 has wheels for. Looks at $PYTHON (which
# then must be right), PATH, pyenv's versions (its shims fail for a version that is not selected, so each candidate
# is tried by running it), then uv's.
set -euo pipefail

candidates() {
    local version
    for version in 3.12 3.13; do
        echo "python$version"
        compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version*/bin/python3" || true
    done
    echo python3
    uv python find '>=3.12,<3.14' 2>/dev/null || true
}

right='import sys; print(sys.executable); sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))'
while read -r candidate; do
    if found=$("$candidate" -c "$right" 2>/dev/null); then
        echo "$found"
        exit 0
    fi
done < <(if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; else candidates; fi)

echo "find_python.sh: no Python 3.12 or 3.13 in ${PYTHON:-PATH, ${PYENV_ROOT:-$HOME/.pyenv}/versions or uv}." \
    "Install one (Debian 13: apt-get install python3 python3-venv; elsewhere: pyenv install 3.12, uv python install" \
    "3.12, or a site module) or name it: PYTHON=/path/to/python3.12 make." >&2
exit 2
