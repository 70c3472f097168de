#!/usr/bin/env bash
# Set up mmela's environment, and print the Python interpreter to use.
#
#   python=$(bash tools/setup.sh)    # progress on stderr, the path on stdout
#   bash tools/setup.sh --force      # repeat every step, e.g. for a new GPU
#
# The environment is the first of these that applies:
#   1. MMELA_PYTHON=/path/to/python;
#   2. the active venv or conda environment, if it has torch, mmengine and
#      mmcv;
#   3. .venv in this checkout, created or reused, with requirements/setup.txt.
# 1 and 2 are used unchanged, except that mmela is installed if it is missing.
#
# .venv only gets wheels. uv installs them if this machine has a wheel of uv, or
# else pip; MMELA_INSTALLER=pip always uses pip. MMELA_MMCV=compiled installs mmcv
# with compiled operators, see tools/compile_mmcv.sh, and MMELA_MMCV=lite removes
# them. If it is unset, mmcv does not change.
#
# shellcheck disable=SC2329  # step calls functions by name
set -euo pipefail
exec 3>&1 1>&2  # stdout only gets the result

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.mmela-setup
log=$venv/setup.log
current=''  # the current step
told=no     # whether an error has been explained

say() { printf 'mmela setup: %s\n' "$*"; }
die() { say "error: $*"; told=yes; exit 1; }

on_exit() {
  local status=$?
  if [ "$status" -ne 0 ] && [ "$told" = no ]; then
    say "error: stopped at: ${current:-the checks before any step};" \
      "run the same command again to continue from there"
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

# Print four lines about an interpreter: a fingerprint of everything that
# determines the content of .venv, the missing ones of the given modules, the
# folder of mmela, and whether mmcv was compiled for the pinned torch. It is
# fast, because it imports nothing. It runs in /, because otherwise Python would
# find mmela in the current directory.
look() {  # look PYTHON MODULE...
  (cd / && "$1" - "$root" "${@:2}") <<'PY'
import hashlib, importlib.util, os, pathlib, sys
from importlib.metadata import distributions
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
pins = (root / 'requirements' / 'setup.txt').read_text('utf-8').split()
found = [f"{d.metadata['Name']}=={d.version}".partition('+')[0]
         for d in distributions()]
print('compiled' if any(x.startswith('mmcv==') for x in found) and
      any(x.startswith('torch==') and x in pins for x in found) else 'lite')
PY
}

survey() {  # survey PYTHON MODULE...: store the lines of look in variables
  local seen
  seen=$(look "$@") || die "$1 does not run"
  { IFS= read -r fingerprint; IFS= read -r missing; IFS= read -r where
    IFS= read -r operators; } <<<"$seen"
}

version_ok() {  # version_ok PYTHON MINOR: is it Python 3.MINOR or newer?
  "$1" -c "import sys; sys.exit(sys.version_info < (3, $2))" 2>/dev/null
}

finish() {
  printf '%s\n' "$python" >&3
  exit 0
}

# --- 1 and 2: an existing environment ---------------------------------------

install_mmela() {
  # If the build tools are installed, pip need not download them.
  set -- install --no-deps
  if "$python" -c 'import setuptools, wheel' 2>/dev/null; then
    set -- "$@" --no-build-isolation
  fi
  "$python" -m pip "$@" -e "$root"
}

use_as_is() {  # use_as_is REASON
  say "using $python unchanged ($1)"
  survey "$python" torch mmengine mmcv numpy scipy click
  [ -z "$missing" ] || die "$python lacks: $missing"
  if [ -z "$where" ]; then
    step "installing mmela into it (pip install --no-deps -e .)" install_mmela
  elif [ "$where" != "$root/mmela" ]; then
    die "$python has a different mmela, $where; to install this one, run:" \
      "$python -m pip install --no-deps -e $root"
  fi
  finish
}

# --- 3: .venv ---------------------------------------------------------------

free_mb() { df -Pk "$1" | awk 'NR == 2 {print int($4 / 1000)}'; }

find_base() {  # find the interpreter for creating .venv
  local name seen=''
  # The pinned torch has wheels for 3.10 to 3.14.
  for name in python3 python python3.{13,12,11,10,14}; do
    command -v "$name" >/dev/null || continue
    if version_ok "$name" 10 && ! version_ok "$name" 15; then
      base=$name
      return
    fi
    seen+=" $name is $("$name" -V 2>&1 | head -n 1);"
  done
  die "there is no Python 3.10 to 3.14, which the pinned torch needs;${seen:-}" \
    "install one, or set MMELA_PYTHON to an environment with Python 3.8 or newer"
}

make_venv() {
  if version_ok "$python" 10 && "$python" -m pip --version >/dev/null 2>&1
  then
    say "reusing $venv"
    return
  fi
  # Never empty a folder that is not an environment.
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    die "$venv is not a virtual environment; move it away"
  fi
  [ "$(free_mb "$root")" -ge 6000 ] ||
    die "$root needs 6000 MB, but only $(free_mb "$root") MB are free; free some space"
  find_base
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$base has no venv module; install it (Debian: python3-venv)"
  "$base" -m venv --clear "$venv"
}

# Pass pip's settings to uv, which does not read them.
uv_settings() {
  local settings name of_pip value
  settings=$("$python" -m pip config list)
  while read -r name of_pip; do
    value=PIP_$(tr 'a-z-' 'A-Z_' <<<"$of_pip")
    value=${!value:-$(sed -n "s/^[^=]*\.$of_pip='\(.*\)'\$/\1/p" \
      <<<"$settings" | tail -n 1)}
    value=${value//'\n'/ }
    if [ -n "$value" ] && [ -z "${!name:-}" ]; then
      export "$name=${value# }"
    fi
  done <<'END'
UV_DEFAULT_INDEX index-url
UV_INDEX extra-index-url
UV_FIND_LINKS find-links
UV_INSECURE_HOST trusted-host
SSL_CERT_FILE cert
HTTPS_PROXY proxy
END
  # Like pip, use the best version of all indexes.
  export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
}

find_uv() {
  uv=$venv/bin/uv
  [ ! -x "$uv" ] || return 0
  uv=$(command -v uv) && return
  "$python" -m pip install 'uv>=0.5' >>"$log" 2>&1 || true
  uv=$venv/bin/uv
  [ -x "$uv" ] || { uv=''; say "uv is not available for this machine; using pip"; }
}

logged() {  # log the output, and also show it on a terminal
  if [ -t 2 ]; then "$@" 2>&1 | tee -a "$log"; else "$@" >>"$log" 2>&1; fi
}

install() {  # install ARGUMENT...: arguments of `pip install`
  if [ -n "$uv" ]; then
    if logged "$uv" pip install --python "$python" "$@"; then return; fi
    [ "$(free_mb "$venv")" -ge 200 ] || explain
    say "uv has failed; trying pip"
  fi
  logged "$python" -m pip install --no-compile "$@" || explain
}

explain() {  # explain the error in the log in one line
  local seen what
  seen=$(tail -n 60 "$log")
  case $seen in
    *'No space left'* | *'os error 28'*) what="the disk is full" ;;
    *'407 '* | *ProxyError* | *tunnel*)
      what="cannot connect through the proxy ${HTTPS_PROXY:-${https_proxy:-}}" ;;
    *CERTIFICATE_VERIFY* | *SSLError*)
      what="the registry's certificate is not trusted; set PIP_CERT" ;;
    *IncompleteRead* | *ConnectionReset* | *' is invalid.'* | *BadZipFile* | \
    *'DO NOT MATCH THE HASHES'* | *'Read timed out'*)
      what="a download was interrupted" ;;
    *NewConnectionError* | *NameResolutionError* | *ConnectTimeout*)
      what="no connection to the package registry; for a proxy, set HTTPS_PROXY" ;;
    *) what=$(grep -i error <<<"$seen" | tail -n 1) || true ;;
  esac
  [ "$(free_mb "$venv")" -ge 200 ] || what="the disk is full"
  die "${current%% (*}: ${what:-it failed}; details are in $log." \
    "Run the same command again to continue from there"
}

install_all() {
  local requirements=$root/requirements
  if [ "$operators" = compiled ]; then
    # Both install the files of mmcv, so only one can be there.
    grep -v '^mmcv-lite' "$requirements/setup.txt" >"$venv/setup.txt"
  else
    cp "$requirements/setup.txt" "$venv/setup.txt"
    logged "$python" -m pip uninstall -y mmcv
  fi
  install -r "$venv/setup.txt" -r "$requirements/build.txt" \
    -r "$requirements/tests.txt" -r "$requirements/docs.txt" \
    -r "$requirements/lint.txt"
}

compile_mmcv() {
  local wheel
  wheel=$(bash "$root/tools/compile_mmcv.sh" "$python") ||
    { told=yes; exit 1; }  # it has explained the error
  logged "$python" -m pip uninstall -y mmcv-lite mmcv
  # Force it, because pip takes another build of this version as installed.
  install --no-deps --force-reinstall "$wheel"
}

# This writes bytecode for the modules in use, whatever the user's settings. pip
# would compile 13,000 files in half a minute, and without bytecode every start
# of training would take 4 s longer.
try_imports() {
  (
    cd /
    unset PYTHONDONTWRITEBYTECODE
    logged "$python" - <<'PY'
import mmela
import matplotlib.pyplot, mmcv.ops, mmdet.apis, mmdet.utils, mmengine.runner
import mmpretrain.apis, pytest, scipy.stats, torch, torchvision
mmdet.utils.register_all_modules(init_default_scope=False)
PY
  ) || die "the packages do not load: $(tail -n 1 "$log"); details are in $log." \
    "If they are damaged, remove $venv and run the same command again"
}

is_set_up() {
  [ "$force" = no ] && [ -r "$stamp" ] && version_ok "$python" 10 || return 1
  survey "$python" torch torchvision mmengine mmcv mmdet mmpretrain pytest
  [ -z "$missing" ] && [ "$where" = "$root/mmela" ] &&
    [ "${MMELA_MMCV:-$operators}" = "$operators" ] &&
    [ "$fingerprint" = "$(cat "$stamp")" ]
}

take_lock() {
  command -v flock >/dev/null || return 0
  exec 9>"$root/.venv.lock"
  flock -n 9 && return 0
  say "waiting until another setup ends"
  flock 9 || say "this file system has no locks; continuing without"
}

set_up_venv() {
  local all=$SECONDS
  say "setting up $venv; the first time this takes one or two minutes and 6 GB"
  # Settings that would change where packages are installed
  unset PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER
  export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
  export PIP_ROOT_USER_ACTION=ignore
  step "creating the virtual environment" make_venv
  rm -f "$stamp"
  : >"$log"
  survey "$python"
  operators=${MMELA_MMCV:-$operators}
  [ "${MMELA_INSTALLER:-uv}" = pip ] || { uv_settings; find_uv; }
  step "installing torch, mmdet, mmpretrain and others (first time: 2.6 GB)" install_all
  [ "$operators" = lite ] || step "compiling mmcv with its operators" compile_mmcv
  step "installing mmela" install --no-deps --no-build-isolation -e "$root"
  step "checking the imports" try_imports

  survey "$python" torch
  [ "$where" = "$root/mmela" ] || die "Python finds mmela in '$where', not in $root"
  printf '%s\n' "$fingerprint" >"$stamp"  # last, because it means finished
  say "setup took $((SECONDS - all)) s"
}

# --- choose the environment -------------------------------------------------

force=no
uv=''
case ${1:-} in
  '') ;;
  --force) force=yes ;;
  *) die "unknown argument '$1'; the only one is --force" ;;
esac
case ${MMELA_MMCV:-lite} in
  lite | compiled) ;;
  *) die "MMELA_MMCV='$MMELA_MMCV' is unknown; allowed are lite and compiled" ;;
esac

if [ -n "${MMELA_PYTHON:-}" ]; then
  python=$(command -v -- "$MMELA_PYTHON") ||
    die "MMELA_PYTHON=$MMELA_PYTHON is not a Python interpreter"
  # Make it absolute, but keep links, because a venv's python is one.
  python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
  version_ok "$python" 8 ||
    die "MMELA_PYTHON=$MMELA_PYTHON is not Python 3.8 or newer"
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
  say "the active environment lacks $missing; using $venv instead"
fi

python=$venv/bin/python
if ! is_set_up; then
  take_lock
  is_set_up || set_up_venv  # another run may have done it meanwhile
fi
finish
