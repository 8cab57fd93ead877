"""KV events in order, per worker, whatever the wire did to them.

Workers number their batches from 0 at their boot. Each worker's feed applies batch n only after
n - 1. A batch that comes early is kept and the missing ones are asked for, once per gap; a batch that
comes again is dropped. A worker that no longer has what it is asked for starts afresh: one batch that
says so, and then everything its cache holds. Until then the index keeps what it knew: a prediction
that is a little old costs less than none. If too much piles up behind a gap, all that waits is
dropped and asked for once more.

A new boot id is a new process with an empty cache and new numbers: everything of the old one is
forgotten, and its late batches are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.contract.messages import BlocksRemoved, BlocksStored, KvEvent
from baton.policy.kv_index import KvIndex

MAX_HELD_BATCHES = 4096
"""Early batches kept per worker; at one batch per 10 ms step, 40 s."""


@dataclass(frozen=True, slots=True)
class AskReplay:
    """Action: ask the worker for its batches first to last, both included."""

    slot: int
    first: int
    last: int


@dataclass(slots=True)
class FeedCounters:
    num_batches: int = 0
    num_duplicates: int = 0
    num_late: int = 0
    """Batches of a process that is gone, or of no worker we know."""
    num_gaps: int = 0
    num_replayed: int = 0
    """Missing batches that did arrive."""
    num_fresh_starts: int = 0
    """Times a worker told all it holds anew."""
    num_overflows: int = 0
    """Times too many batches waited behind a gap."""
    num_malformed: int = 0


@dataclass(slots=True)
class _Feed:
    boot_id: str
    next: int = 0
    held: dict[int, Sequence[KvEvent]] = field(default_factory=dict)
    asked: int = 0
    """Batches before this number have been asked for."""


class KvFeeds:
    """The only writer of the index."""

    def __init__(self, index: KvIndex, max_held_batches: int = MAX_HELD_BATCHES) -> None:
        self.counters = FeedCounters()
        self._index = index
        self._max_held = max_held_batches
        self._feeds: dict[int, _Feed] = {}

    def joined(self, slot: int, boot_id: str) -> None:
        """A worker registered. The same process registering again (a lost connection) keeps what we
        know of it; what was missed meanwhile shows as a gap, or as a fresh start."""
        feed = self._feeds.get(slot)
        if feed is None:
            self._index.open(slot)
        elif feed.boot_id == boot_id:
            return
        else:
            self._index.clear(slot)
        self._feeds[slot] = _Feed(boot_id)

    def left(self, slot: int) -> None:
        if self._feeds.pop(slot, None) is not None:
            self._index.close(slot)

    def received(
        self,
        slot: int,
        boot_id: str,
        sequence: int,
        events: Sequence[KvEvent],
        *,
        is_fresh_start: bool = False,
    ) -> AskReplay | None:
        """A batch, live or replayed: the two need not be told apart."""
        feed = self._feeds.get(slot)
        if feed is None or feed.boot_id != boot_id:
            self.counters.num_late += 1
            return None
        if sequence < feed.next or sequence in feed.held:
            self.counters.num_duplicates += 1
            return None
        if is_fresh_start:
            self._start_afresh(slot, feed, sequence, events)
            return None
        if sequence > feed.next:
            return self._keep(slot, feed, sequence, events)
        if sequence < feed.asked:
            self.counters.num_replayed += 1
        self._apply(slot, feed, events)
        self._apply_held(slot, feed)
        return None

    def _keep(self, slot: int, feed: _Feed, sequence: int, events: Sequence[KvEvent]) -> AskReplay | None:
        """A batch from behind a gap."""
        feed.held[sequence] = events
        if len(feed.held) > self._max_held:
            self.counters.num_overflows += 1
            feed.held.clear()
            feed.asked = sequence + 1
            return AskReplay(slot, feed.next, sequence)
        # Whatever is held has been asked up to: from `first` on all are missing.
        first, feed.asked = max(feed.next, feed.asked), max(feed.asked, sequence + 1)
        if first >= sequence:
            return None
        self.counters.num_gaps += 1
        return AskReplay(slot, first, sequence - 1)

    def _start_afresh(self, slot: int, feed: _Feed, sequence: int, events: Sequence[KvEvent]) -> None:
        self.counters.num_fresh_starts += 1
        self._index.clear(slot)
        feed.next = sequence
        feed.held = {number: held for number, held in feed.held.items() if number > sequence}
        self._apply(slot, feed, events)
        self._apply_held(slot, feed)

    def _apply_held(self, slot: int, feed: _Feed) -> None:
        while feed.held and (events := feed.held.pop(feed.next, None)) is not None:
            self._apply(slot, feed, events)

    def _apply(self, slot: int, feed: _Feed, events: Sequence[KvEvent]) -> None:
        self.counters.num_batches += 1
        feed.next += 1
        for event in events:
            if isinstance(event, BlocksStored):
                try:
                    self._index.stored(
                        slot, event.block_hashes, event.parent_hash, event.token_ids, event.namespace
                    )
                except ValueError:
                    self.counters.num_malformed += 1
            elif isinstance(event, BlocksRemoved):
                self._index.removed(slot, event.block_hashes)
            else:
                self._index.clear(slot)
