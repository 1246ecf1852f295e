#!/usr/bin/env bash
# Installs Slurm and munge for the cluster tests, on Debian as root only; never fails: without them those tests skip.
set -euo pipefail
if command -v slurmctld >/dev/null && command -v munged >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "slurm-wlm and munge are not installed (needs Debian and root): the cluster tests will be skipped" >&2
    exit 0
fi
echo "installing slurm-wlm and munge for the cluster tests" >&2
export DEBIAN_FRONTEND=noninteractive
install=(timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge)
if ! { "${install[@]}" || { timeout 300 apt-get update -qq && "${install[@]}"; }; } >/dev/null 2>&1; then
    echo "apt-get could not install slurm-wlm and munge: the cluster tests will be skipped" >&2
fi
