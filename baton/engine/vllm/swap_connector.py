"""The NIXL connectors with a host tier behind them, for decode workers on CPU.

NIXL first: until a request's KV has come from its prefill worker nobody else has it, and whoever claimed a
part of it before (a shared prefix, say) would make vLLM tell the prefill worker to let go of the rest.
After that NIXL claims nothing any more, and what a preemption took comes from the tier.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorTransferResults

from baton.engine.vllm.host_swap import HostStore, SwapOrders, new_tier
from baton.transfer.nixl_connector import LeasedNixlConnector
from baton.transfer.nixl_stream_connector import StreamingNixlConnector

CONNECTOR_NAME = "SwappingNixlConnector"
STREAMING_CONNECTOR_NAME = "SwappingStreamingNixlConnector"
CONNECTOR_MODULE = __name__


class SwappingNixlConnector(LeasedNixlConnector):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        is_scheduler = role == KVConnectorRole.SCHEDULER
        self.host_tier = new_tier(vllm_config, kv_cache_config) if is_scheduler else None
        self._store = None if is_scheduler else HostStore(kv_cache_config.num_blocks)
        self._loading: set[str] = set()
        """Requests whose next allocation is for a load from the tier."""

    # Scheduler side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        num_tokens, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self._loading.discard(request.request_id)
        if num_tokens != 0:
            return num_tokens, is_async
        assert self.host_tier is not None
        num_tokens = self.host_tier.num_to_load(request, num_computed_tokens)
        if num_tokens > 0:
            self._loading.add(request.request_id)
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0 and request.request_id in self._loading:
            assert self.host_tier is not None
            self._loading.discard(request.request_id)
            self.host_tier.load(request, blocks.get_block_ids()[0], num_external_tokens)
            return
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        metadata = super().build_connector_meta(scheduler_output)
        assert self.host_tier is not None
        metadata.swap_orders = self.host_tier.take_orders()
        return metadata

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self._forget(request)
        result: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
        return result

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self._forget(request)
        result: tuple[bool, dict[str, Any] | None] = super().request_finished_all_groups(request, block_ids)
        return result

    def _forget(self, request: Any) -> None:
        assert self.host_tier is not None
        self._loading.discard(request.request_id)
        self.host_tier.forget(request.request_id)

    # Worker side.

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        assert self._store is not None
        self._store.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        super().handle_preemptions(kv_connector_metadata)
        assert self._store is not None
        self._store.save(_orders(kv_connector_metadata))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        assert self._store is not None
        self._store.load(_orders(self._connector_metadata))

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        assert self._store is not None
        results.finished_recving |= self._store.take_loaded()
        return results


class SwappingStreamingNixlConnector(SwappingNixlConnector, StreamingNixlConnector):
    """The tier around the streaming connector: both have the same base, and the tier's calls go on to it."""


def _orders(metadata: Any) -> SwapOrders:
    orders: SwapOrders = metadata.swap_orders
    return orders
