#!/usr/bin/env bash
# Sends a prompt to a coordinator and prints the tokens as they come: `baton submit` in its environment.
#   scripts/submit.sh [--address HOST:5571] [--max-tokens 64] "Once upon a time"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

[ -x "$VENV/bin/baton" ] || ensure_environment cpu
exec "$VENV/bin/baton" submit "$@"
