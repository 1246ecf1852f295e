#!/usr/bin/env bash
# Installs chromium for the test of report.html, on Debian as root only; never fails: without it that test skips.
set -euo pipefail
if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "chromium is not installed (needs Debian and root): the test of report.html in a browser will be skipped" >&2
    exit 0
fi
echo "installing chromium for the test of report.html" >&2
export DEBIAN_FRONTEND=noninteractive
install=(timeout 300 apt-get install -y -qq --no-install-recommends chromium)
if ! { "${install[@]}" || { timeout 300 apt-get update -qq && "${install[@]}"; }; } >/dev/null 2>&1; then
    echo "apt-get could not install chromium: the test of report.html in a browser will be skipped" >&2
fi
