"""Who holds which prefix, as far as the workers tell: the live side of `baton.policy.kv_index`.

There is an index while some registered worker publishes KV events, and none otherwise: then no
prompt is hashed and no hit predicted. Each worker's part begins empty when it registers; a worker
whose cache is not empty tells all of it first. What a prompt was just routed to is expected there
until its events have arrived.
"""

from __future__ import annotations

from collections import deque

from baton.contract.messages import AllBlocksCleared, AskKvReplay, KvEvents
from baton.policy.expectations import Expectations
from baton.policy.hotspot import HotspotGuard
from baton.policy.kv_feed import KvFeeds
from baton.policy.kv_index import KvIndex
from baton.policy.router import Router
from coordinator.fleet import Worker

EVENTS_LAG_S = 1.0
"""A prompt's KV events may reach us later than its end does: an engine tells the two by different
ways. So long it is still expected; until the cache drops it, that is no more than the truth."""


class FleetPrefixes:
    def __init__(self, router: Router, *, max_bytes: int) -> None:
        self._router = router
        self._max_bytes = max_bytes
        self._publishers: set[str] = set()
        self._index: KvIndex | None = None
        self._feeds: KvFeeds | None = None
        self._guard: HotspotGuard | None = None
        self._computed: deque[tuple[float, str]] = deque()
        """Prompts whose events are due: until when, handoff id."""

    # ── facts, for metrics ───────────────────────────────────────────────────────────────────

    @property
    def num_blocks(self) -> int:
        return self._index.num_blocks if self._index is not None else 0

    @property
    def num_bytes(self) -> int:
        """Of memory, estimated."""
        return self._index.num_bytes if self._index is not None else 0

    def is_told_by(self, worker_id: str) -> bool:
        """Whether this worker tells what it holds."""
        return worker_id in self._publishers

    def counts(self) -> dict[str, float]:
        """Since the first of the publishers that are registered now; empty without one."""
        if self._index is None or self._feeds is None or self._guard is None:
            return {}
        index, feeds, guard = self._index.counters, self._feeds.counters, self._guard.counters
        return {
            "blocks stored": index.num_stored,
            "blocks removed": index.num_removed,
            "blocks forgotten": index.num_evicted,
            "blocks of unknown parents": index.num_unknown_parents,
            "removals of unknown blocks": index.num_unknown_removals,
            "gaps": feeds.num_gaps,
            "batches replayed": feeds.num_replayed,
            "fresh starts": feeds.num_fresh_starts,
            "malformed": feeds.num_malformed,
            "hotspot alarms": guard.num_alarms,
            "hotspots acted on": guard.num_acted,
            "requests diverted": guard.num_diverted,
        }

    # ── workers ──────────────────────────────────────────────────────────────────────────────

    def worker_joined(self, worker: Worker) -> None:
        registration = worker.registration
        if not registration.has_kv_events:
            return
        if self._feeds is None:
            self._index = KvIndex(registration.layout.block_size_tokens, max_bytes=self._max_bytes)
            self._feeds = KvFeeds(self._index)
            self._guard = HotspotGuard()
            self._router.know(self._index, Expectations(), self._guard)
        self._publishers.add(worker.worker_id)
        self._feeds.joined(worker.account.slot, registration.boot_id)

    def worker_left(self, worker: Worker) -> None:
        if self._feeds is None or worker.worker_id not in self._publishers:
            return
        self._publishers.remove(worker.worker_id)
        self._feeds.left(worker.account.slot)
        self._router.worker_left(worker.account.slot)
        if not self._publishers:
            self._index = self._feeds = self._guard = None
            self._computed.clear()
            self._router.know(None)

    def received(self, worker: Worker, message: KvEvents) -> AskKvReplay | None:
        """What to ask the worker for, if something is missing."""
        if self._feeds is None:
            return None
        slot = worker.account.slot
        ask = self._feeds.received(
            slot,
            worker.registration.boot_id,
            message.sequence,
            message.events,
            is_fresh_start=message.is_fresh_start,
        )
        if any(isinstance(event, AllBlocksCleared) for event in message.events):
            self._router.worker_left(slot)  # what was expected of it has been cleared with the rest
        return None if ask is None else AskKvReplay(first=ask.first, last=ask.last)

    # ── prompts on their way ─────────────────────────────────────────────────────────────────

    def prompt_computed(self, handoff_id: str, now_s: float) -> None:
        if self._feeds is not None:
            self._computed.append((now_s + EVENTS_LAG_S, handoff_id))

    def settle_due(self, now_s: float) -> None:
        while self._computed and self._computed[0][0] <= now_s:
            self._router.leg_ended(self._computed.popleft()[1])
