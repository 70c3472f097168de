#!/usr/bin/env bash
# Set up mmela if needed, then run tools/demo.py with the given arguments:
#   bash tools/demo.sh --help
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
python=$(bash "$tools/setup.sh")
# On a busy machine, threads that spin while they wait are many times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec "$python" "$tools/demo.py" "$@"
