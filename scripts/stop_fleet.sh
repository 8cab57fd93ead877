#!/usr/bin/env bash
# Stops what the start scripts recorded, and nothing else.
#   scripts/stop_fleet.sh                     everything: coordinator, then all fleets
#   scripts/stop_fleet.sh prefill [decode …]  these
#   scripts/stop_fleet.sh --timeout-s 5       how long each may finish its requests before it is killed
# The coordinator goes first: it finishes accepted requests, for which it needs the workers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fleet_lib.sh"

timeout_s=40 # above the drain timeout of coordinator and workers
fleets=()
while [ $# -gt 0 ]; do
  case $1 in
    --timeout-s) timeout_s=${2:?--timeout-s needs a value} && shift 2 ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) die "no option $1" ;;
    *) fleets+=("$1") && shift ;;
  esac
done
[ ${#fleets[@]} -gt 0 ] || fleets=(coordinator prefill decode both)

shopt -s nullglob
waves=()
for fleet in "${fleets[@]}"; do
  records=("$ROOT/.run/$fleet"/*.pid)
  if [ ${#records[@]} -eq 0 ]; then
    echo "$fleet: nothing recorded"
  elif [ "$fleet" = coordinator ]; then
    processes stop --timeout-s "$timeout_s" "${records[@]}"
  else
    waves+=("${records[@]}")
  fi
done
[ ${#waves[@]} -eq 0 ] || processes stop --timeout-s "$timeout_s" "${waves[@]}"
