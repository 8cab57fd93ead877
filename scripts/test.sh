#!/usr/bin/env bash
# Everything that CI runs: environment, lint, types, import layers, all tests.
#   scripts/test.sh            all tests
#   scripts/test.sh --quick    without those that start real engines
# Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"

marks=()
if [ "${1-}" = --quick ]; then
  shift
  marks=(-m "not slow")
fi

"$ROOT/scripts/check.sh"
# Hundreds of processes would each compile our code again.
unset PYTHONDONTWRITEBYTECODE
echo "== tests"
started=$SECONDS
"$VENV/bin/pytest" --durations=10 "${marks[@]}" "$@"
echo "== tests passed after $((SECONDS - started)) s; everything after $SECONDS s"
