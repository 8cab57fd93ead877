"""Scheduler side of streaming: what each step finished, whose blocks are promised, what is over.

A prefill request that names a stream (`STREAM_ID`) is streamed to whoever registers for it, before,
during or after its prefill. A decode request that names one reserves its blocks at once and waits; while
too many blocks are promised and empty it stays in the queue, in order (`baton.handoff.credits`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from baton.handoff.credits import CreditLine
from baton.transfer.nixl_connector import LeasedMetadata, LeasedPullScheduler

STREAM_ID = "baton_stream_id"
"""In a prefill and its decode request: the hand-off id under which they find each other."""
STREAM_WRITES = "baton_stream_writes"
"""In a prefill request, instead of the engine's setting: `chunk`, `layer` or `end` (all of it after the
last chunk)."""
STREAM_LEASE_S = "baton_stream_lease_s"
"""In a decode request: how long its reservation stands at most."""
STREAM_FIRST_TOKEN = "baton_stream_first_token"
"""In a decode request: the prefill worker's token comes with the KV, and the answer goes on from it."""

DEFAULT_RESERVATION_LEASE_S = 120.0
DEFAULT_RESERVED_SHARE = 0.5
"""Of the pool: blocks that are promised and still empty leave the other half to decoding."""


@dataclass(frozen=True, slots=True)
class StreamProgress:
    """One prompt's blocks after this step."""

    handoff_id: str
    writes: str
    block_ids: list[int]
    num_ready: int
    num_total: int


@dataclass(frozen=True, slots=True)
class StreamReservation:
    handoff_id: str
    engine_id: str
    host: str
    port: int
    tp_size: int
    num_skipped: int
    block_ids: list[int]
    lease_s: float
    wants_first_token: bool


@dataclass(frozen=True, slots=True)
class EndedPrefill:
    lease_s: float | None
    """None: nobody wants the KV."""
    first_token: int | None


@dataclass(slots=True)
class StreamOrders:
    """What the scheduler tells the workers about streams in one step; by vLLM's request id."""

    progress: dict[str, StreamProgress] = field(default_factory=dict)
    preempted: dict[str, str] = field(default_factory=dict)
    """→ hand-off id."""
    ended: dict[str, EndedPrefill] = field(default_factory=dict)
    reservations: dict[str, StreamReservation] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    """Reservations whose request is over."""


class StreamMetadata(LeasedMetadata):
    def __init__(self, leased: LeasedMetadata, orders: StreamOrders) -> None:
        super().__init__(leased)
        self.windows, self.released_req_ids = leased.windows, leased.released_req_ids
        self.digests, self.rest_s = leased.digests, leased.rest_s
        self.orders = orders


@dataclass(slots=True)
class FirstTokens(KVConnectorWorkerMetadata):
    """What the workers tell the scheduler in one step: tokens that came with KV, by vLLM's request id."""

    by_request: dict[str, int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FirstTokens:
        assert isinstance(other, FirstTokens)
        return FirstTokens(self.by_request | other.by_request)


@dataclass(slots=True)
class _Prefill:
    request: Any
    handoff_id: str
    writes: str
    block_ids: list[int] = field(default_factory=list)


class StreamScheduler(LeasedPullScheduler):
    """Adds streams; requests without one take the pull path."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        share = float(extra_config.get("kv_reserved_share", DEFAULT_RESERVED_SHARE))
        self._credits = CreditLine(max_reserved_blocks=max(1, int(share * kv_cache_config.num_blocks)))
        self._writes = str(extra_config.get("kv_stream_writes", "chunk"))
        self._prefills: dict[str, _Prefill] = {}
        self._reserved: set[str] = set()
        self._first_tokens: dict[str, int] = {}
        """Of reservations; the workers of all ranks tell them, each when it has its part of the KV."""
        self._given: dict[str, int] = {}
        self._orders = StreamOrders()

    # ── decode side ───────────────────────────────────────────────────────────────────────────

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        num_tokens, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if num_tokens and _reads_stream(request):
            num_blocks = -(-num_tokens // self.block_size)
            if not self._credits.ask(request.request_id, num_blocks):
                return None, False  # stays in the queue
        return num_tokens, is_async

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        if _reads_stream(request):
            params["do_remote_prefill"] = False  # once, also when a failed one is recomputed here
            if num_external_tokens > 0:
                self._reserve(request, params, blocks, num_external_tokens)
            return
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if params.get("do_remote_decode") and params.get(STREAM_ID):
            self._prefills.setdefault(
                request.request_id,
                _Prefill(request, params[STREAM_ID], params.get(STREAM_WRITES, self._writes)),
            )

    def _reserve(self, request: Any, params: dict[str, Any], blocks: Any, num_tokens: int) -> None:
        num_total = -(-int(params["remote_num_tokens"]) // self.block_size)
        num_blocks = -(-num_tokens // self.block_size)
        (missing,) = blocks.get_unhashed_block_ids_all_groups()
        self._reserved.add(request.request_id)
        self.expect(request, missing[:num_blocks])
        self._orders.reservations[request.request_id] = StreamReservation(
            handoff_id=params[STREAM_ID],
            engine_id=params["remote_engine_id"],
            host=params["remote_host"],
            port=int(params["remote_port"]),
            tp_size=int(params["tp_size"]),
            num_skipped=num_total - num_blocks,
            block_ids=list(missing[:num_blocks]),
            lease_s=float(params.get(STREAM_LEASE_S, DEFAULT_RESERVATION_LEASE_S)),
            wants_first_token=bool(params.get(STREAM_FIRST_TOKEN, False)),
        )

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        if isinstance(told := connector_output.kv_connector_worker_meta, FirstTokens):
            self._first_tokens |= told.by_request
        for req_id in connector_output.finished_recving or ():
            self._reserved.discard(req_id)
            self._credits.give_back(req_id)
            token_id = self._first_tokens.pop(req_id, None)
            if token_id is not None and req_id not in connector_output.failed_recving:
                self._given[req_id] = token_id

    def take_first_tokens(self) -> dict[str, int]:
        """Of requests whose KV was found complete since the last call."""
        given, self._given = self._given, {}
        return given

    def on_new_request(self, request: Any) -> None:
        if not _reads_stream(request):  # a stream's source is kept alive by its own lease
            super().on_new_request(request)

    # ── prefill side ──────────────────────────────────────────────────────────────────────────

    def build_connector_meta(self, scheduler_output: Any) -> StreamMetadata:
        orders, self._orders = self._orders, StreamOrders()
        if self._prefills:
            self._note_progress(scheduler_output, orders)
        return StreamMetadata(super().build_connector_meta(scheduler_output), orders)

    def _note_progress(self, scheduler_output: Any, orders: StreamOrders) -> None:
        for req_id in scheduler_output.preempted_req_ids or ():
            if prefill := self._prefills.get(req_id):
                prefill.block_ids = []
                orders.preempted[req_id] = prefill.handoff_id
        for req_id, new_block_ids, is_resumed in yield_req_data(scheduler_output):
            prefill = self._prefills.get(req_id)
            if prefill is None:
                continue
            if is_resumed:
                prefill.block_ids = []
            if new_block_ids is not None:
                prefill.block_ids.extend(new_block_ids[0])
            num_tokens = prefill.request.num_prompt_tokens
            num_computed = prefill.request.num_computed_tokens + scheduler_output.num_scheduled_tokens[req_id]
            num_total = -(-num_tokens // self.block_size)
            is_last = num_computed >= num_tokens
            orders.progress[req_id] = StreamProgress(
                handoff_id=prefill.handoff_id,
                writes=prefill.writes,
                block_ids=prefill.block_ids[:num_total],
                num_ready=num_total if is_last else num_computed // self.block_size,
                num_total=num_total,
            )

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        req_id = request.request_id
        params = request.kv_transfer_params or {}
        if _reads_stream(request):
            self._credits.give_back(req_id)  # never got its blocks
            params["do_remote_prefill"] = False
            return False, None
        if req_id in self._reserved:
            # vLLM keeps the blocks, and we the credits, until this request is reported as received.
            self._orders.aborted.add(req_id)
            return False, None
        prefill = self._prefills.pop(req_id, None)
        must_hold, result = super().request_finished(request, block_ids)
        if prefill is None:
            return must_hold, result
        tokens = request.output_token_ids
        self._orders.ended[req_id] = EndedPrefill(
            lease_s=self._kv_lease_duration if must_hold else None, first_token=tokens[0] if tokens else None
        )
        if result is not None:
            result[STREAM_ID] = prefill.handoff_id
        return True, result  # a write may be reading them; released when none is

    def _is_over_with_prefill(self, request: Any) -> bool:
        """Never so of a stream: the decode worker may have been promised this token too. It is to find out
        by itself that nothing follows, and not to see its stream fail."""
        params = request.kv_transfer_params or {}
        return STREAM_ID not in params and super()._is_over_with_prefill(request)


def _reads_stream(request: Any) -> bool:
    params = request.kv_transfer_params or {}
    return bool(
        params.get("do_remote_prefill") and params.get(STREAM_ID) and "remote_block_ids" not in params
    )
