#!/usr/bin/env bash
# Set up mmela if needed, then run pytest on tests/ with a process for each core.
# Arguments go to pytest; paths are relative to the checkout:
#   bash tools/run_tests.sh tests/test_packaging.py -k shell
#   bash tools/run_tests.sh -n 0 --pdb      # in one process
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$(bash "$root/tools/setup.sh")
# One thread per process, because the processes share the cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then
  parallel=(-n auto --dist loadgroup)  # tests/conftest.py sets the groups
fi
cd "$root"  # without a path, pyproject.toml gives tests/
exec "$python" -m pytest -q -rs --durations=10 \
  ${parallel[@]+"${parallel[@]}"} "$@"
