#!/usr/bin/env bash
# The tests in one command: set up if needed, then run pytest on tests/.
# Arguments go to pytest, paths relative to the checkout:
#   bash tools/run_tests.sh tests/test_packaging.py -k shell
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$(bash "$root/tools/setup.sh")
# Threads that spin while they wait are many times slower on a busy machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
cd "$root"  # pytest.ini names tests/ for when no path is given
exec "$python" -m pytest -q -rs --durations=10 "$@"
