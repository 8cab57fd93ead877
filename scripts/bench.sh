#!/usr/bin/env bash
# Baton beside its peers, in one run on this machine: scripts/bench.sh door | e2e [--quick] [--save] [--json]
# Needs .venv (scripts/serve.sh or scripts/test.sh makes it) and a C compiler; peers go to .peers/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
if [[ ! -x $python ]]; then
    echo "bench: .venv is missing; scripts/test.sh or scripts/serve.sh makes it" >&2
    exit 2
fi
exec "$python" -m benchmarks "$@"
