#!/usr/bin/env bash
# The offline planner: which parallelism and how many workers for each phase. Needs no GPU.
#   scripts/plan.sh --model Llama-3.1-8B --gpus 4x8:h100 --workload TRACE --ttft 0.4 --tpot 0.04 …
# Arguments go to `baton plan` (`scripts/plan.sh --help`).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

[ -x "$VENV/bin/baton" ] || ensure_environment cpu # a CUDA environment plans as well
exec "$VENV/bin/baton" plan "$@"
