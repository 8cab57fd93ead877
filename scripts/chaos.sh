#!/usr/bin/env bash
# Fleets that are killed while they serve: scripts/chaos.sh simulated | storm | real | soak [--quick] [--save] [--json]
# Needs .venv (scripts/serve.sh or scripts/test.sh makes it). docs/reliability.md tells what is proven.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
if [[ ! -x $python ]]; then
    echo "chaos: .venv is missing; scripts/test.sh or scripts/serve.sh makes it" >&2
    exit 2
fi
exec "$python" -m tests.chaos "$@"
