#!/usr/bin/env bash
# The main job in one command: set up if needed, then run tools/demo.py.
# Arguments go to it:  bash tools/demo.sh --help
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
python=$(bash "$tools/setup.sh")
# Threads that spin while they wait are many times slower on a busy machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec "$python" "$tools/demo.py" "$@"
