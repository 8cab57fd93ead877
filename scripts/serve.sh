#!/usr/bin/env bash
# One command: environment, demo model, coordinator + 1 prefill + 1 decode worker, checked and ready
# to call. Arguments go to `baton serve` (`scripts/serve.sh --help`).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_environment "$(device_of "$@")"
exec "$VENV/bin/baton" serve --run-dir "$ROOT/.run/serve" --demo-model "$ROOT/.models/demo" "$@"
