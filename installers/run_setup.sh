#!/usr/bin/env bash
# Runs install.sh as a job, for sites whose login nodes may not compile: under PBS or Slurm, else right here.
# Usage: installers/run_setup.sh TARGET_DIR [options of install.sh] [-- options of qsub or sbatch]
# Example: installers/run_setup.sh "$PWD/env" --profile abci -- -P GROUP -q QUEUE -l select=1 -l walltime=01:00:00
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    exit $(($# == 0 ? 2 : 0))
fi
mkdir -p "$1"
target=$(cd "$1" && pwd)
shift
install=("$here/install.sh" "$target")
while [ $# -gt 0 ] && [ "$1" != -- ]; do install+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
if command -v qsub >/dev/null; then
    command=(qsub -N megatron-cpt-setup -V -j oe -o "$target/setup.log" "$@" -- "${install[@]}")
elif command -v sbatch >/dev/null; then
    command=(sbatch --job-name megatron-cpt-setup --output "$target/setup.log" "$@" --wrap "$(printf '%q ' "${install[@]}")")
else
    command=("${install[@]}")
fi
printf '+ %s\n' "${command[*]}" >&2
exec "${command[@]}"
