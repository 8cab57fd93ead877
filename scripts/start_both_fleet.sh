#!/usr/bin/env bash
# Starts workers that serve both phases in the background and returns when all have registered.
#   scripts/start_both_fleet.sh [--num-workers N] [--coordinator HOST:PORT] [--model PATH_OR_NAME]
#     [--tensor-parallel-size N] [--pipeline-parallel-size N] [--device cuda --devices "0-7" | "0,1;2,3"] …
# Further arguments go to each `baton both`. Without --model they serve the demo model. A second call
# adds workers; scripts/stop_fleet.sh both stops them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fleet_lib.sh"

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
}

start_worker_fleet both "$@"
