#!/usr/bin/env bash
# Style and types: set up if needed, then ruff and mypy as CI runs them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$(bash "$root/tools/setup.sh")
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
