#!/usr/bin/env bash
# Lint (Python and shell), formatting, types and import layers; no process is started.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"

ensure_environment cpu dev

failed=()

stage() { # stage NAME COMMAND...: a failure does not hide what the later stages would say
  local name=$1 started=$SECONDS
  shift
  echo "== $name: $*"
  "$@" || failed+=("$name")
  echo "== $name took $((SECONDS - started)) s"
}

stage lint "$VENV/bin/ruff" check .
stage shell "$VENV/bin/shellcheck" scripts/*.sh .ci/run
stage format "$VENV/bin/ruff" format --check .
stage types "$VENV/bin/mypy"
stage layers "$VENV/bin/pytest" -q tests/test_layers.py

[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
