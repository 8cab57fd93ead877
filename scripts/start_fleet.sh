#!/usr/bin/env bash
# Starts a whole fleet from one file, as `baton plan --fleet-file` writes it, and returns when it is ready.
#   scripts/start_fleet.sh FLEET.yaml                          coordinator and the workers of node 0
#   scripts/start_fleet.sh FLEET.yaml --node 1 --coordinator HOST:5570   the workers of another node, on that host
# The file's form is told in baton/launch/fleet_file.py. scripts/stop_fleet.sh stops what was started on this host.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fleet_lib.sh"

file="" node=0 coordinator=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    --node | --coordinator)
      [ $# -ge 2 ] || die "$1 needs a value"
      if [ "$1" = --node ]; then node=$2; else coordinator=$2; fi
      shift 2
      ;;
    -*) die "no option $1" ;;
    *)
      [ -z "$file" ] || die "one fleet file, not $file and $1"
      file=$1
      shift
      ;;
  esac
done
[ -n "$file" ] || die "which fleet file? scripts/start_fleet.sh FLEET.yaml"
[ "$node" = 0 ] || [ -n "$coordinator" ] || die "--node $node needs --coordinator HOST:PORT of node 0"

device=cpu
! grep -qE '^[[:space:]]+device:[[:space:]]*cuda' "$file" 2>/dev/null || device=cuda
ensure_environment "$device"
fleets=$("$PYTHON" -m baton.launch.fleet_file "$file" "$node" "$ROOT/.run/fleet") || exit 2

started=()
# A worker fleet that does not start takes the rest down again: half a plan serves nobody.
trap '[ $? -eq 0 ] || [ ${#started[@]} -eq 0 ] || "$ROOT/scripts/stop_fleet.sh" --timeout-s 15 "${started[@]}"' EXIT
while read -r role count devices tensor pipeline config; do
  if [ "$role" = coordinator ]; then
    [ -z "$coordinator" ] || continue
    started+=(coordinator)
    "$ROOT/scripts/start_coordinator.sh" --config "$config"
    coordinator=127.0.0.1:$(sed -nE 's/^fleet_port:[[:space:]]*([0-9]+).*/\1/p' "$config" | grep . || echo 5570)
    continue
  fi
  arguments=(--config "$config" --num-workers "$count" --coordinator "$coordinator")
  if [ "$devices" != - ]; then
    arguments+=(--devices "$devices" --tensor-parallel-size "$tensor" --pipeline-parallel-size "$pipeline")
  fi
  started+=("$role")
  "$ROOT/scripts/start_${role}_fleet.sh" "${arguments[@]}"
done <<<"$fleets"
echo "fleet ready: $file, node $node"
