#!/usr/bin/env bash
# All that is to be measured on a GPU, in less than nine minutes, without network:
#   bash tools/benchmark/gpu.sh OUT [arguments of tools/benchmark/gpu.py]
# writes tables.md, results.json, triton_blocks.json and log.txt into OUT.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,4s/^# //p' "$0"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${MMELA_PYTHON:-python3}" -m tools.benchmark.gpu "$out" "$@"
