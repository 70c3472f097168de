#!/usr/bin/env bash
# Compile mmcv with its operators for an interpreter that has torch, and print
# the wheel:
#
#   wheel=$(bash tools/compile_mmcv.sh PYTHON)   # progress on stderr
#
# It is compiled once per torch, Python and CPU/CUDA, in some 10 minutes on 2
# cores for the CPU; the wheel is kept in
# ${XDG_CACHE_HOME:-$HOME/.cache}/mmela/wheels. PYTHON needs what is in
# requirements/build.txt.
set -euo pipefail
exec 3>&1 1>&2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mmela/wheels
scratch=''  # where mmcv is being compiled

say() { printf 'mmela setup: %s\n' "$*"; }
die() { say "error: $*"; exit 1; }
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Say what to compile mmcv for: sets variant, and for CUDA the environment.
choose_variant() {
  local torch_cuda=$1 release='' home why='' include
  variant=cpu
  command -v nvidia-smi >/dev/null || return 0
  nvidia-smi -L 2>/dev/null | grep '^GPU' >/dev/null || return 0
  home=${CUDA_HOME:-}
  if [ -z "$home" ] && [ -x /usr/local/cuda/bin/nvcc ]; then
    home=/usr/local/cuda
  elif [ -z "$home" ] && command -v nvcc >/dev/null; then
    home=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
  fi
  if [ -x "$home/bin/nvcc" ]; then
    release=$("$home/bin/nvcc" --version |
      sed -n 's/.*release \([0-9]*\).*/\1/p')
  fi
  if [ -z "$torch_cuda" ]; then
    why='this torch is a CPU build'
  elif [ -z "$release" ]; then
    why='there is no nvcc'
  elif [ "$release" != "${torch_cuda%%.*}" ]; then
    why="nvcc is CUDA $release, torch is CUDA $torch_cuda"
  fi
  if [ -n "$why" ]; then
    say "WARNING: a GPU is here but $why: mmcv's own operators (RoIAlign and" \
      "others) will run on the CPU only; without MMELA_MMCV=compiled those of" \
      "torchvision run on the GPU"
    return 0
  fi
  if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap \
      --format=csv,noheader | sort -u | paste -sd';' -) ||
      TORCH_CUDA_ARCH_LIST=''  # an old driver: torch asks the GPU itself
  fi
  export CUDA_HOME=$home TORCH_CUDA_ARCH_LIST
  variant=cuda${torch_cuda}-sm${TORCH_CUDA_ARCH_LIST//[^0-9a-zA-Z.+]/_}
  if [ ! -e "$home/include/cusparse.h" ]; then
    # A toolkit without the library headers: torch's own packages have them.
    for include in "$site"/nvidia/*/include; do
      [ ! -d "$include" ] || export CPATH=$include${CPATH:+:$CPATH}
    done
  fi
}

# Set wheel_dir, where the mmcv wheel for this torch and Python belongs.
locate_wheel() {
  local seen tag torch_cuda
  seen=$("$python" - <<'PY'
import os, runpy, sysconfig
site = sysconfig.get_path('platlib')
torch = runpy.run_path(os.path.join(site, 'torch', 'version.py'))
print(site)
print('torch' + torch['__version__'] + '-' + sysconfig.get_config_var('SOABI'))
print(torch['cuda'] or '')
print('end')
PY
) || die "$python has no torch to compile mmcv for"
  { IFS= read -r site; IFS= read -r tag; IFS= read -r torch_cuda; } <<<"$seen"
  choose_variant "$torch_cuda"
  wheel_dir=$cache/$tag-$variant
}

find_wheel() {
  local file
  wheel=''
  for file in "$wheel_dir/mmcv-$mmcv"-*.whl; do
    if [ -f "$file" ]; then wheel=$file; fi
  done
}

build() {
  local header memory jobs cxx
  read -r cxx _ <<<"${CXX:-c++}"
  command -v "$cxx" >/dev/null ||
    die "no C++ compiler ($cxx) to build mmcv with (Debian: g++)"
  header=$("$python" -c \
    'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [ -e "$header" ] ||
    die "no $header to build mmcv with (Debian: python3-dev)"

  # A job of this compilation takes up to 2.5 GB.
  if [ -z "${MAX_JOBS:-}" ] && [ -r /proc/meminfo ]; then
    memory=$(awk '/^MemAvailable/ {print int($2 / 2500000)}' /proc/meminfo)
    jobs=$(getconf _NPROCESSORS_ONLN)
    [ "$memory" -ge "$jobs" ] || jobs=$memory
    [ "$jobs" -ge 1 ] || jobs=1
    export MAX_JOBS=$jobs
  fi
  mkdir -p "$cache"
  if command -v flock >/dev/null; then  # another checkout may be at it
    exec 9>"$cache/lock"
    flock 9 || say "no locks on this file system; going on without"
    find_wheel
    [ -z "$wheel" ] || return 0
  fi
  say "mmcv $mmcv is compiled now for $variant, once, by ${MAX_JOBS:-all} jobs"
  rm -rf "$cache"/.build.*  # of runs that were killed
  scratch=$(mktemp -d "$cache/.build.XXXXXX")
  (
    export MMCV_WITH_OPS=1 TMPDIR=$scratch PATH=${python%/*}:$PATH
    if [ "$variant" = cpu ]; then
      # Without nvcc, a GPU in sight would make mmcv's setup.py fail.
      export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=''
    else
      export FORCE_CUDA=1
    fi
    # No pip cache: its key knows nothing of torch. Not quiet: pip says once
    # a minute that it is still at it.
    PIP_QUIET=0 "$python" -m pip wheel \
      --no-deps --no-build-isolation --no-cache-dir \
      --no-binary mmcv -w "$scratch/out" "mmcv==$mmcv"
  ) || die "mmcv did not compile; the reason is above." \
    "Without MMELA_MMCV=compiled none is needed"
  # A move within one file system: the cache never holds half a wheel.
  mkdir -p "$wheel_dir"
  mv -f "$scratch"/out/mmcv-*.whl "$wheel_dir/"
  find_wheel
}

python=${1:?"usage: bash tools/compile_mmcv.sh PYTHON"}
mmcv=$(sed -n 's/^mmcv-lite==\([^ ]*\).*/\1/p' "$root/requirements/setup.txt")
locate_wheel
find_wheel
[ -n "$wheel" ] || build
printf '%s\n' "$wheel" >&3
