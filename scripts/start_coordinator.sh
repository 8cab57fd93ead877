#!/usr/bin/env bash
# Starts a coordinator in the background and returns when its doors are open.
#   scripts/start_coordinator.sh [--host 0.0.0.0] [--http-port 8000] [--fleet-port 5570] …
# Arguments go to `baton coordinator`. Workers on other hosts need `--host` with an address they reach.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fleet_lib.sh"

ensure_environment cpu
case " $* " in *" --help "* | *" -h "*) exec "$VENV/bin/baton" coordinator --help ;; esac
start_member coordinator coordinator "$VENV/bin/baton" coordinator "$@"
await_members coordinator " coordinator ready " coordinator
grep -m1 " coordinator ready " "$ROOT/.run/coordinator/logs/coordinator.log"
