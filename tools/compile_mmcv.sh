#!/usr/bin/env bash
# Compile mmcv with its operators for an interpreter that has torch, and print
# the wheel:
#
#   wheel=$(bash tools/compile_mmcv.sh PYTHON)   # progress on stderr
#
# Compiling takes about 10 minutes on 2 cores for the CPU. The wheel is kept in
# ${XDG_CACHE_HOME:-$HOME/.cache}/mmela/wheels, one for each torch, Python and
# CPU or CUDA. PYTHON needs the packages of requirements/build.txt.
set -euo pipefail
exec 3>&1 1>&2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mmela/wheels
scratch=''  # folder for compiling mmcv

say() { printf 'mmela setup: %s\n' "$*"; }
die() { say "error: $*"; exit 1; }
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Choose the target: set variant, and for CUDA the environment.
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
    say "WARNING: this machine has a GPU, but $why. The compiled operators of" \
      "mmcv, such as RoIAlign, will only run on the CPU. Without" \
      "MMELA_MMCV=compiled, torchvision's operators run on the GPU"
    return 0
  fi
  if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap \
      --format=csv,noheader | sort -u | paste -sd';' -) ||
      TORCH_CUDA_ARCH_LIST=''  # an old driver; torch queries the GPU itself
  fi
  export CUDA_HOME=$home TORCH_CUDA_ARCH_LIST
  variant=cuda${torch_cuda}-sm${TORCH_CUDA_ARCH_LIST//[^0-9a-zA-Z.+]/_}
  if [ ! -e "$home/include/cusparse.h" ]; then
    # If the toolkit lacks the library headers, use those in torch's packages.
    for include in "$site"/nvidia/*/include; do
      [ ! -d "$include" ] || export CPATH=$include${CPATH:+:$CPATH}
    done
  fi
}

# Set wheel_dir, the folder of the mmcv wheel for this torch and Python.
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
) || die "$python has no torch, which mmcv is compiled for; install torch first"
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
    die "there is no C++ compiler ($cxx) for mmcv; install one (Debian: g++)"
  header=$("$python" -c \
    'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [ -e "$header" ] ||
    die "there is no $header for mmcv; install it (Debian: python3-dev)"

  # Each job takes up to 2.5 GB.
  if [ -z "${MAX_JOBS:-}" ] && [ -r /proc/meminfo ]; then
    memory=$(awk '/^MemAvailable/ {print int($2 / 2500000)}' /proc/meminfo)
    jobs=$(getconf _NPROCESSORS_ONLN)
    [ "$memory" -ge "$jobs" ] || jobs=$memory
    [ "$jobs" -ge 1 ] || jobs=1
    export MAX_JOBS=$jobs
  fi
  mkdir -p "$cache"
  if command -v flock >/dev/null; then  # another checkout may be compiling
    exec 9>"$cache/lock"
    flock 9 || say "this file system has no locks; continuing without"
    find_wheel
    [ -z "$wheel" ] || return 0
  fi
  say "compiling mmcv $mmcv for $variant with ${MAX_JOBS:-all} jobs; this is only" \
    "needed once"
  rm -rf "$cache"/.build.*  # left by killed runs
  scratch=$(mktemp -d "$cache/.build.XXXXXX")
  (
    export MMCV_WITH_OPS=1 TMPDIR=$scratch PATH=${python%/*}:$PATH
    if [ "$variant" = cpu ]; then
      # mmcv's setup.py fails if it sees a GPU without nvcc.
      export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=''
    else
      export FORCE_CUDA=1
    fi
    # No pip cache, because its key does not include torch. Not quiet, so that
    # pip reports every minute that it is still running.
    PIP_QUIET=0 "$python" -m pip wheel \
      --no-deps --no-build-isolation --no-cache-dir \
      --no-binary mmcv -w "$scratch/out" "mmcv==$mmcv"
  ) || die "mmcv did not compile; the reason is above." \
    "Without MMELA_MMCV=compiled it is not needed"
  # Move within one file system, so that the cache never has half a wheel.
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
