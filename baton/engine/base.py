"""What a worker needs of an engine.

An engine computes legs: a prefill leg (prompt in, KV held, one token out) or a decode leg (prompt
and possibly KV in, tokens out). Commands are plain calls that return at once; what comes of them
is told to an `EngineListener`, on the event loop the engine was started on, in the order in which
the engine did it. Every leg that was started ends in exactly one of: a delta with a finish_reason
(decode), `on_prefill_finished` (prefill), `on_leg_failed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from baton.contract.errors import ErrorReport
from baton.contract.messages import (
    KvEvent,
    KvLayout,
    KvSource,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    TokenLogprobs,
    WorkerCapacity,
    WorkerLoad,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """Known once the engine is up; goes into the worker's registration."""

    layout: KvLayout
    capacity: WorkerCapacity
    tensor_parallel_size: int
    pipeline_parallel_size: int
    transfer_endpoint: str
    stream_params: dict[str, Any] | None = None
    """As in `RegisterWorker`."""
    streams_first_token: bool = False
    """As in `RegisterWorker`."""
    has_kv_events: bool = False
    """`EngineListener.on_kv_events` will hear of every change of the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedPrefill:
    delta: SequenceDelta
    kv_source: KvSource | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    queue_s: float
    prefill_s: float


class EngineListener(Protocol):
    """Callbacks on the engine's event loop; they must not block or raise."""

    def on_step(self, deltas: list[SequenceDelta]) -> None:
        """Tokens of decode legs, all of one step together. Empty: prompts got on (`Engine.load` counts
        their tokens), for engines that know it before a prompt is done."""

    def on_kv_events(self, events: list[KvEvent]) -> None:
        """What one step changed in the prefix cache, in order and complete from the engine's start on
        (an empty cache). May come shortly after the step's tokens. An engine that loses track says
        AllBlocksCleared and goes on with what it knows."""

    def on_prefill_finished(self, finished: FinishedPrefill) -> None: ...

    def on_leg_failed(self, handoff_id: str, error: ErrorReport) -> None:
        """Aborts too, with code `aborted`. What the leg held is free, or leased out on purpose."""

    def on_engine_dead(self, reason: str) -> None:
        """The engine cannot go on. Legs in flight have been failed before this call."""


class Engine(Protocol):
    async def start(self, listener: EngineListener) -> EngineDescription:
        """Load, warm up, be ready to serve. Raises EngineFailed with a sentence."""

    def start_prefill(self, message: StartPrefill) -> None: ...

    def start_decode(self, message: StartDecode) -> None:
        """`message.kv_source.lease_s` counts from this call. KV that could arrive after the lease
        is not used: the leg recomputes or fails, by the engine's setting."""

    def abort(self, handoff_id: str) -> None:
        """Unknown and finished legs are ignored."""

    def load(self) -> WorkerLoad: ...

    async def stop(self) -> None:
        """Abort what runs and free everything, child processes included. Idempotent."""
