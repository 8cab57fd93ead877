"""KV copies in host memory, for engines on CPU: vLLM's own offload connectors need CUDA streams.

One tier per engine, in two halves as every connector of vLLM. `HostTier` lives beside the scheduler: it
knows how many tokens of which request have a copy, and collects orders. `HostStore` lives in each
worker and holds the bytes. Orders travel with the step's connector metadata:

* a *save* is carried out before the step computes, so blocks given up in that step are still whole;
* a *load* fills blocks that vLLM has allocated for a request that waits for KV; it is reported as
  received in the same step, and vLLM goes on as after any other read.

A copy is of a request's own blocks, the last and unfinished one included, so that nothing is computed
again. It lives until its request ends. When the tier is full nothing more is saved, and who has no
complete copy is not evicted by our choice.

`HostSwapConnector` is the tier alone. Decode workers use it beside NIXL (`swap_connector`), which is
asked first: a request's KV is read from its prefill worker once, and from here ever after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)

HOST_BYTES = "host_kv_bytes"
"""In `kv_connector_extra_config`: how much each rank's part of the tier may hold."""


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks of one request, from its `first`th on, by their ids on the device."""

    request_id: str
    first: int
    block_ids: tuple[int, ...]


@dataclass(slots=True)
class SwapOrders(KVConnectorMetadata):
    saves: list[BlockRun] = field(default_factory=list)
    loads: list[BlockRun] = field(default_factory=list)
    drops: list[str] = field(default_factory=list)


class HostTier:
    """Scheduler side. Pure bookkeeping."""

    def __init__(self, *, capacity_blocks: int, block_size_tokens: int, block_bytes: int = 0) -> None:
        self._capacity_blocks = capacity_blocks
        self._block_bytes = block_bytes
        self._block_size = block_size_tokens
        self._saved: dict[str, int] = {}
        """Tokens of each request that have a copy, counted from its first."""
        self._num_used_blocks = 0
        self._orders = SwapOrders()
        self.num_swaps_out = 0
        self.num_swaps_in = 0
        self._num_blocks_out = 0
        self._num_blocks_in = 0

    def num_saved_tokens(self, request_id: str) -> int:
        return self._saved.get(request_id, 0)

    def save(self, request_id: str, block_ids: Sequence[int], num_tokens: int) -> bool:
        """Have the first `num_tokens` copied in this step, as far as they are not. False: no room."""
        num_saved = self._saved.get(request_id, 0)
        if num_tokens <= num_saved:
            return True
        first, end = num_saved // self._block_size, -(-num_tokens // self._block_size)
        num_more = end - -(-num_saved // self._block_size)
        if self._num_used_blocks + num_more > self._capacity_blocks:
            return False
        self._num_used_blocks += num_more
        self._saved[request_id] = num_tokens
        self._num_blocks_out += end - first
        self._orders.saves.append(BlockRun(request_id, first, tuple(block_ids[first:end])))
        return True

    def num_to_load(self, request: Any, num_computed_tokens: int) -> int:
        """Tokens a preempted request can get from here beyond those it has (whole blocks)."""
        if not request.num_preemptions:
            return 0
        num_saved: int = min(self._saved.get(request.request_id, 0), request.num_tokens - 1)
        return max(0, num_saved - num_computed_tokens)

    def load(self, request: Any, block_ids: Sequence[int], num_tokens: int) -> None:
        """vLLM allocated `block_ids` for all of its tokens, and wants the last `num_tokens` of the copy."""
        num_saved = min(self._saved[request.request_id], request.num_tokens - 1)
        first, end = (num_saved - num_tokens) // self._block_size, -(-num_saved // self._block_size)
        self._orders.loads.append(BlockRun(request.request_id, first, tuple(block_ids[first:end])))
        self.num_swaps_in += 1
        self._num_blocks_in += end - first

    def forget(self, request_id: str) -> None:
        num_tokens = self._saved.pop(request_id, 0)
        if num_tokens:
            self._num_used_blocks -= -(-num_tokens // self._block_size)
            self._orders.drops.append(request_id)

    def clear(self) -> None:
        for request_id in list(self._saved):
            self.forget(request_id)

    def take_orders(self) -> SwapOrders:
        orders, self._orders = self._orders, SwapOrders()
        return orders

    def counters(self) -> dict[str, int]:
        return {
            "num_swaps_out": self.num_swaps_out,
            "num_swaps_in": self.num_swaps_in,
            "num_bytes_out": self._num_blocks_out * self._block_bytes,
            "num_bytes_in": self._num_blocks_in * self._block_bytes,
            "num_host_blocks": self._num_used_blocks,
        }


class HostStore:
    """Worker side: the bytes of this rank's layers."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._layers: list[torch.Tensor] = []
        self._copies: dict[str, dict[int, list[torch.Tensor]]] = {}
        self._loaded: set[str] = set()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        for name, tensor in kv_caches.items():
            if tensor.shape[0] != self._num_blocks:
                raise ValueError(
                    f"layer {name} has KV of shape {tuple(tensor.shape)}, expected {self._num_blocks} "
                    "blocks first"
                )
        self._layers = list(kv_caches.values())

    def save(self, orders: SwapOrders) -> None:
        for run in orders.saves:
            copies = self._copies.setdefault(run.request_id, {})
            for position, block_id in enumerate(run.block_ids, start=run.first):
                copies[position] = [layer[block_id].clone() for layer in self._layers]
        for request_id in orders.drops:
            self._copies.pop(request_id, None)

    def load(self, orders: SwapOrders) -> None:
        for run in orders.loads:
            copies = self._copies[run.request_id]
            for position, block_id in enumerate(run.block_ids, start=run.first):
                for layer, copy in zip(self._layers, copies[position], strict=True):
                    layer[block_id].copy_(copy)
            self._loaded.add(run.request_id)

    def take_loaded(self) -> set[str]:
        loaded, self._loaded = self._loaded, set()
        return loaded


def host_tier_of(connector: Any) -> HostTier | None:
    """The tier beside a scheduler's connector, if it has one."""
    tier: HostTier | None = getattr(connector, "host_tier", None)
    return tier


def new_tier(vllm_config: Any, kv_cache_config: Any) -> HostTier:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ValueError(f"the host tier copies whole blocks of one kind; this model has {len(groups)} kinds")
    block_bytes = groups[0].kv_cache_spec.page_size_bytes * len(groups[0].layer_names)
    num_bytes = int(vllm_config.kv_transfer_config.kv_connector_extra_config[HOST_BYTES])
    return HostTier(
        capacity_blocks=num_bytes // block_bytes,
        block_size_tokens=vllm_config.cache_config.block_size,
        block_bytes=block_bytes,
    )


class HostSwapConnector(KVConnectorBase_V1):
    """The tier as a connector of its own."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        is_scheduler = role == KVConnectorRole.SCHEDULER
        self.host_tier = new_tier(vllm_config, kv_cache_config) if is_scheduler else None
        self._store = None if is_scheduler else HostStore(kv_cache_config.num_blocks)

    # Scheduler side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        assert self.host_tier is not None
        num_tokens = self.host_tier.num_to_load(request, num_computed_tokens)
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self.host_tier is not None
        if num_external_tokens > 0:
            self.host_tier.load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> SwapOrders:
        assert self.host_tier is not None
        return self.host_tier.take_orders()

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        assert self.host_tier is not None
        self.host_tier.forget(request.request_id)
        return False, None

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._store is not None
        self._store.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        assert self._store is not None
        self._store.save(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self._store is not None
        self._store.load(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self._store is not None
        return KVConnectorTransferResults(finished_recving=self._store.take_loaded())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are whole by the time they are reported."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves are ordered by the scheduler."""

    def wait_for_save(self) -> None:
        """Saves are done before the step computes."""
