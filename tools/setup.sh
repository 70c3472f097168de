#!/usr/bin/env bash
# Set up what mmela needs, and print the Python interpreter to use.
#
#   python=$(bash tools/setup.sh)    # progress on stderr, the path on stdout
#   bash tools/setup.sh --force      # every step again, e.g. with a new GPU
#
# The environment is the first of these that applies:
#   1. MMELA_PYTHON=/path/to/python, used as it is;
#   2. the activated venv or conda environment, if torch, mmengine and mmcv
#      are in it, used as it is;
#   3. .venv in this checkout, made or reused, with requirements/setup.txt.
# In 1 and 2 nothing is installed but mmela itself, and that only if missing.
#
# mmcv is compiled once per torch, Python and CPU/CUDA; the wheel is kept in
# ${XDG_CACHE_HOME:-$HOME/.cache}/mmela/wheels.
#
# shellcheck disable=SC2329  # step calls functions by name
set -euo pipefail
exec 3>&1 1>&2  # stdout carries the result and nothing else

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.mmela-setup
current=''  # the step that is running
scratch=''  # where mmcv is being compiled
told=no     # whether an error has been explained

say() { printf 'mmela setup: %s\n' "$*"; }
die() { say "error: $*"; told=yes; exit 1; }

on_exit() {
  local status=$?
  [ -z "$scratch" ] || rm -rf "$scratch"
  if [ "$status" -ne 0 ] && [ "$told" = no ]; then
    say "error: stopped at: ${current:-the checks before any step};" \
      "run the same command again to go on from there"
  fi
}
trap on_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() {  # step TEXT COMMAND...
  local start=$SECONDS
  current=$1
  shift
  say "$current ..."
  "$@"
  say "... done in $((SECONDS - start)) s"
  current=''
}

# Print three lines about an interpreter: a fingerprint of all that decides
# what .venv holds, which of the modules named are missing, where mmela is.
# (A last line stands there as $() drops empty ones at the end.) It imports
# nothing, so it takes no time; run from / so that the checkout is not found
# merely for being the current directory.
look() {  # look PYTHON MODULE...
  (cd / && "$1" - "$root" "${@:2}") <<'PY'
import hashlib, importlib.util, os, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [root / 'setup.py', root / 'mmela' / 'version.py',
         root / 'tools' / 'setup.sh', *root.glob('requirements/*.txt')]
text = repr((str(root), sys.version)).encode()
text += b''.join(path.read_bytes() for path in sorted(files))
print(hashlib.sha256(text).hexdigest())
print(*[m for m in sys.argv[2:] if importlib.util.find_spec(m) is None])
spec = importlib.util.find_spec('mmela')
where = list(spec.submodule_search_locations)[:1] if spec else []
print(os.path.realpath(where[0]) if where else '')
print('end')
PY
}

survey() {  # survey PYTHON MODULE...: look, into variables
  local seen
  seen=$(look "$@") || die "$1 does not run"
  { IFS= read -r fingerprint; IFS= read -r missing; IFS= read -r where; } \
    <<<"$seen"
}

version_ok() {  # version_ok PYTHON MINOR: is it Python 3.MINOR or newer?
  "$1" -c "import sys; sys.exit(sys.version_info < (3, $2))" 2>/dev/null
}

finish() {
  printf '%s\n' "$python" >&3
  exit 0
}

# --- 1 and 2: an environment that the user already has ---------------------

install_mmela() {
  # With the build tools at hand pip need not fetch them: works offline.
  set -- install --no-deps
  if "$python" -c 'import setuptools, wheel' 2>/dev/null; then
    set -- "$@" --no-build-isolation
  fi
  "$python" -m pip "$@" -e "$root"
}

use_as_is() {  # use_as_is REASON
  say "using $python as it is ($1)"
  survey "$python" torch mmengine mmcv numpy scipy
  [ -z "$missing" ] || die "$python lacks: $missing"
  if [ -z "$where" ]; then
    step "installing mmela into it (pip install --no-deps -e .)" install_mmela
  elif [ "$where" != "$root/mmela" ]; then
    die "$python has another mmela, $where; for this one run:" \
      "$python -m pip install --no-deps -e $root"
  fi
  finish
}

# --- 3: .venv ---------------------------------------------------------------

find_base() {  # the interpreter that .venv is made with
  local name
  # The pinned torch has wheels for 3.10 to 3.14.
  for name in python3 python python3.{13,12,11,10,14}; do
    if command -v "$name" >/dev/null && version_ok "$name" 10 &&
      ! version_ok "$name" 15; then
      base=$name
      return
    fi
  done
  die "no Python 3.10 to 3.14 found, which the pinned torch needs" \
    "(an environment of your own with Python >= 3.8: see MMELA_PYTHON)"
}

make_venv() {
  if version_ok "$python" 10 && "$python" -m pip --version >/dev/null 2>&1
  then
    say "reusing $venv"
    return
  fi
  # Never empty a folder that is something else.
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    die "$venv is there but is no virtual environment; move it away"
  fi
  find_base
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$base has no venv module; install it (Debian: python3-venv)"
  "$base" -m venv --clear "$venv"
}

pip() { "$python" -m pip "$@"; }

install_torch() {
  pip install --no-compile -c "$root/requirements/setup.txt" torch torchvision
}

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
      "others) will run on the CPU only"
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
)
  { IFS= read -r site; IFS= read -r tag; IFS= read -r torch_cuda; } <<<"$seen"
  choose_variant "$torch_cuda"
  wheel_dir=$cache/wheels/$tag-$variant
}

find_wheel() {
  local file
  wheel=''
  for file in "$wheel_dir/mmcv-$mmcv"-*.whl; do
    if [ -f "$file" ]; then wheel=$file; fi
  done
}

build_mmcv() {
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
  rm -rf "$cache"/wheels/.build.*  # of runs that were killed
  mkdir -p "$cache/wheels"
  scratch=$(mktemp -d "$cache/wheels/.build.XXXXXX")
  (
    export MMCV_WITH_OPS=1 TMPDIR=$scratch PATH=$venv/bin:$PATH
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
  )
  # A move within one file system: the cache never holds half a wheel.
  mkdir -p "$wheel_dir"
  mv -f "$scratch"/out/mmcv-*.whl "$wheel_dir/"
  rm -rf "$scratch"
  scratch=''
}

# By force, as another build of the same version counts as installed for pip.
install_mmcv() {
  pip install --no-compile --no-deps --force-reinstall "$wheel"
}

install_rest() {
  pip install --no-compile -r "$root/requirements/setup.txt" \
    -r "$root/requirements/build.txt" -r "$root/requirements/tests.txt"
}

install_editable() {
  pip install --no-deps --no-build-isolation --use-pep517 -e "$root"
}

# Bytecode is written here, for what is in use, whatever the user's settings:
# pip would compile 13,000 files in half a minute, and none would make every
# start of a training 4 s slower.
try_imports() {
  (
    cd /
    unset PYTHONDONTWRITEBYTECODE
    "$python" - <<'PY'
import matplotlib.pyplot, mmcv.ops, mmdet.apis, mmdet.utils, mmengine.runner
import mmpretrain.apis, pytest, scipy.stats, torch, torchvision
mmdet.utils.register_all_modules(init_default_scope=False)
PY
  ) || die "the packages do not load; if mmcv is to blame, remove $wheel_dir"
}

is_set_up() {
  [ "$force" = no ] && [ -r "$stamp" ] && version_ok "$python" 10 || return 1
  survey "$python" torch torchvision mmengine mmcv mmdet mmpretrain pytest
  [ -z "$missing" ] && [ "$where" = "$root/mmela" ] &&
    [ "$fingerprint" = "$(cat "$stamp")" ]
}

take_lock() {
  mkdir -p "$cache"
  command -v flock >/dev/null || return 0
  exec 9>"$cache/lock"
  flock -n 9 && return 0
  say "waiting for another set-up to end"
  flock 9 || say "no locks on this file system; going on without"
}

set_up_venv() {
  local all=$SECONDS cpus
  say "setting up $venv; the first time takes some minutes and 6 GB"
  step "virtual environment" make_venv
  rm -f "$stamp"
  export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
  export PIP_ROOT_USER_ACTION=ignore
  [ -t 2 ] || export PIP_QUIET=1  # progress bars are for people
  step "build tools" pip install -r "$root/requirements/build.txt"
  step "torch and torchvision (a large download)" install_torch

  mmcv=$(sed -n 's/^mmcv==\([^ ]*\).*/\1/p' "$root/requirements/setup.txt")
  locate_wheel
  find_wheel
  if [ -z "$wheel" ]; then
    cpus=$(getconf _NPROCESSORS_ONLN)
    say "mmcv is compiled now, once; that takes about 7 minutes on 2 cores" \
      "for the CPU, longer for CUDA; here are $cpus cores"
    step "compiling mmcv $mmcv for $variant" build_mmcv
    find_wheel
  fi
  step "mmcv from $wheel" install_mmcv
  step "mmdet, mmpretrain and the rest" install_rest
  step "mmela, editable" install_editable
  step "trying the imports" try_imports

  survey "$python" torch
  [ "$where" = "$root/mmela" ] || die "mmela is found in '$where'"
  printf '%s\n' "$fingerprint" >"$stamp"  # last: no stamp, not finished
  say "set up in $((SECONDS - all)) s"
}

# --- which one --------------------------------------------------------------

force=no
case ${1:-} in
  '') ;;
  --force) force=yes ;;
  *) die "unknown argument '$1' (there is only --force)" ;;
esac

if [ -n "${MMELA_PYTHON:-}" ]; then
  python=$(command -v -- "$MMELA_PYTHON") ||
    die "MMELA_PYTHON: no Python interpreter at $MMELA_PYTHON"
  # Absolute, but with links kept: a venv's python is one.
  python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
  version_ok "$python" 8 ||
    die "MMELA_PYTHON: $MMELA_PYTHON is not Python 3.8 or newer"
  use_as_is MMELA_PYTHON
fi

active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -n "$active" ] && [ ! "$active" -ef "$venv" ] &&
  version_ok "$active/bin/python" 8; then
  survey "$active/bin/python" torch mmengine mmcv
  if [ -z "$missing" ]; then
    python=$active/bin/python
    use_as_is 'the active environment'
  fi
  say "the active environment lacks $missing: left alone, $venv is used"
fi

python=$venv/bin/python
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mmela
if ! is_set_up; then
  take_lock
  is_set_up || set_up_venv  # another run may have done it meanwhile
fi
finish
