"""An engine with vLLM's own NIXL connector instead of ours."""

from __future__ import annotations

import time
from typing import Any

from baton.engine.vllm.engine import VllmEngine
from baton.engine.vllm.settings import VllmEngineSettings, transfer_arguments
from baton.engine.vllm.transfer_params import LEASE_END_S


class StockEngine(VllmEngine):
    """That connector tells nobody when a lease ends, and asks nobody."""

    def _finish_prefill(self, leg: Any, output: Any) -> None:
        if output.kv_transfer_params:
            output.kv_transfer_params[LEASE_END_S] = time.monotonic() + 3600.0
        super()._finish_prefill(leg, output)


def stock_arguments(settings: VllmEngineSettings) -> dict[str, Any]:
    """In place of `baton.engine.vllm.engine.transfer_arguments`."""
    return {
        "kv_connector": "NixlConnector",
        "kv_role": transfer_arguments(settings)["kv_role"],
        "kv_load_failure_policy": settings.kv_load_failure_policy,
        "kv_connector_extra_config": {"kv_lease_duration": settings.kv_lease_s},
    }
