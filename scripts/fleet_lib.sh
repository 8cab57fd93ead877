# shellcheck shell=bash
# Sourced by the fleet scripts. Processes are started in sessions of their own and recorded in
# .run/FLEET/NAME.pid (baton/launch/processes.py tells why and how); logs are in .run/FLEET/logs.

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

READY_TIMEOUT_S=600

processes() { "$PYTHON" -m baton.launch.processes "$@"; }

record_of() { echo "$ROOT/.run/$1/$2.pid"; }

start_member() { # start_member FLEET NAME COMMAND...: returns at once
  local fleet=$1 name=$2
  shift 2
  processes start --record "$(record_of "$fleet" "$name")" --log "$ROOT/.run/$fleet/logs/$name.log" -- "$@"
}

# await_members FLEET LINE NAME...: until each has written LINE to its log; if one does not, all of
# these are stopped and the script ends.
await_members() {
  local fleet=$1 line=$2 name records=()
  shift 2
  for name in "$@"; do records+=("$(record_of "$fleet" "$name")"); done
  trap 'processes stop --timeout-s 15 "${records[@]}"; exit 130' INT TERM
  if ! processes wait --line "$line" --timeout-s "$READY_TIMEOUT_S" "${records[@]}"; then
    processes stop --timeout-s 15 "${records[@]}"
    die "$fleet fleet did not start; what had been started was stopped"
  fi
  trap - INT TERM
}

# The address under which another host reaches this one: the one this host would use to talk to the
# coordinator. No packet is sent.
own_address_towards() {
  "$PYTHON" - "$1" <<'PYTHON'
import socket, sys
from baton.wire.endpoints import DEFAULT_FLEET_PORT, parse_address
host, port = parse_address(sys.argv[1], DEFAULT_FLEET_PORT)
family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
with socket.socket(family, kind) as probe:
    probe.connect(address)
    print(probe.getsockname()[0])
PYTHON
}

demo_model() { # makes it if it is not there, prints its path
  "$PYTHON" - "$ROOT/.models/demo" <<'PYTHON'
import sys
from baton.demo_model import build_demo_model, is_complete
is_complete(sys.argv[1]) or build_demo_model(sys.argv[1])
print(sys.argv[1])
PYTHON
}

start_worker_fleet() { # start_worker_fleet ROLE ARGUMENTS...
  local role=$1
  shift
  local num_workers=1 devices="" rest=()
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage ;;
      --num-workers | --devices)
        [ $# -ge 2 ] || die "$1 needs a value"
        if [ "$1" = --devices ]; then devices=$2; else num_workers=$2; fi
        shift 2
        ;;
      --num-workers=*) num_workers=${1#*=} && shift ;;
      --devices=*) devices=${1#*=} && shift ;;
      *) rest+=("$1") && shift ;;
    esac
  done
  [[ $num_workers =~ ^[1-9][0-9]*$ ]] || die "--num-workers is $num_workers, expected 1 or more"
  local device
  device=$(device_of "${rest[@]}")
  # Before the environment, which another device would make anew.
  if [ "$device" = cuda ]; then
    [ -n "$devices" ] || die "--devices is needed with --device cuda: two fleets of one host must not share GPUs"
  elif [ -n "$devices" ]; then
    die "--devices names GPUs, and --device is $device"
  fi
  ensure_environment "$device"

  local coordinator host model tensor pipeline
  coordinator=$(option_value coordinator 127.0.0.1:5570 "${rest[@]}")
  host=$(option_value host "" "${rest[@]}")
  if [ -z "$host" ]; then host=$(own_address_towards "$coordinator"); fi
  rest+=(--coordinator "$coordinator" --host "$host")
  if [ "$(option_value engine vllm "${rest[@]}")" = vllm ] && [ -z "$(option_value config "" "${rest[@]}")" ]; then
    model=$(option_value model "" "${rest[@]}")
    rest+=(--model "${model:-$(demo_model)}")
  fi
  local groups=()
  if [ "$device" = cuda ]; then
    tensor=$(option_value tensor-parallel-size 1 "${rest[@]}")
    pipeline=$(option_value pipeline-parallel-size 1 "${rest[@]}")
    devices=$("$PYTHON" -m baton.launch.devices "$devices" "$num_workers" $((tensor * pipeline))) || exit 2
    mapfile -t groups <<<"$devices"
  fi

  local names=() n=0 name command
  while [ ${#names[@]} -lt "$num_workers" ]; do
    n=$((n + 1))
    name=$role-$n
    [ ! -e "$(record_of "$role" "$name")" ] || continue # a second call adds workers
    command=("$VENV/bin/baton" "$role" --worker-id "$name-$(hostname -s)-$$" "${rest[@]}")
    if [ ${#groups[@]} -gt 0 ]; then command=(env "CUDA_VISIBLE_DEVICES=${groups[${#names[@]}]}" "${command[@]}"); fi
    start_member "$role" "$name" "${command[@]}"
    names+=("$name")
  done
  await_members "$role" " worker ready " "${names[@]}"
}
