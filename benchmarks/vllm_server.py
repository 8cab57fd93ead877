"""A vLLM API server with exactly the engine settings a Baton worker would use.

    python -m benchmarks.vllm_server --role prefill|decode|colocated --model PATH --port N
        --side-channel-port N --max-batch-size N --max-num-batched-tokens N
        [--connector settings|ours|stock]

The settings come from the product's own functions, so "same settings" cannot drift apart:
executor, threads, block size, KV memory. `colocated` has no connector; the others have one of

    settings  the same executor, threads and progress thread (off), which vLLM can only be given
              through our connector module; everything else as vLLM's own connector does it
    ours      all that Baton's connector does for an engine: it also stays on its cores and rests
              while it waits
    stock     vLLM's own connector, progress thread spinning: what a user of vLLM gets

vLLM's `serve` command asks for the version of a distribution called `vllm`, which the CPU build
does not have, so the server's entry point is called directly. Its access log is off.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from baton.contract.lifecycle import WorkerRole
from baton.engine.vllm.settings import (
    VllmEngineSettings,
    engine_arguments,
    set_environment,
    transfer_arguments,
)

COLOCATED = "colocated"

NOT_SETTINGS = ("is_affinity_kept", "is_idle_pace_enabled")
"""Keys of our connector that change what vLLM does, rather than choose what it offers."""


def stock_transfer_arguments(settings: VllmEngineSettings) -> dict[str, Any]:
    ours = transfer_arguments(settings)
    return {"kv_connector": "NixlConnector", "kv_role": ours["kv_role"]}


def same_settings_arguments(settings: VllmEngineSettings) -> dict[str, Any]:
    ours = transfer_arguments(settings)
    extra = {
        key: value for key, value in ours["kv_connector_extra_config"].items() if key not in NOT_SETTINGS
    }
    return ours | {"kv_connector_extra_config": extra}


CONNECTORS = {
    "settings": same_settings_arguments,
    "ours": transfer_arguments,
    "stock": stock_transfer_arguments,
}


def server_argv(settings: VllmEngineSettings, port: int, transfer: dict[str, Any] | None) -> list[str]:
    """The server's command line for keyword arguments of AsyncEngineArgs."""
    arguments = dict(engine_arguments(settings))
    if transfer is not None:
        arguments["kv_transfer_config"] = json.dumps(transfer)
    argv = ["--host", "127.0.0.1", "--port", str(port)]
    argv += ["--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv += [f"--{flag}", str(value)]
    return argv


def main() -> None:
    parser = argparse.ArgumentParser(description="A vLLM API server with a Baton worker's engine settings.")
    parser.add_argument("--role", choices=["prefill", "decode", COLOCATED], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--side-channel-port", type=int, required=True)
    parser.add_argument("--max-batch-size", type=int, required=True)
    parser.add_argument("--max-num-batched-tokens", type=int, required=True)
    parser.add_argument("--connector", choices=list(CONNECTORS), default="settings")
    options = parser.parse_args()
    is_colocated = options.role == COLOCATED
    settings = VllmEngineSettings(
        model=options.model,
        role=WorkerRole.PREFILL if is_colocated else WorkerRole(options.role),
        side_channel_port=options.side_channel_port,
        max_batch_size=options.max_batch_size,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    set_environment(settings, options.side_channel_port)
    transfer = None if is_colocated else CONNECTORS[options.connector](settings)
    sys.argv[1:] = server_argv(settings, options.port, transfer)
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
