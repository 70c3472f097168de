#!/usr/bin/env bash
# Set up mmela if needed, then check style and types with ruff and mypy, as in CI.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$(bash "$root/tools/setup.sh")
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
