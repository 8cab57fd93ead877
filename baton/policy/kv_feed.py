"""KV events in order, per worker, whatever the wire did to them.

Engines number their event batches from 0. Each worker's feed applies batch n only after n - 1. A
batch that comes early is kept and the missing ones are asked for, once per gap; a batch that comes
again is dropped. If the engine cannot replay the gap any more (its buffer is bounded) or too much
piles up behind it, what we know of that worker can no longer be trusted: its part of the index is
cleared and the feed goes on after the gap. Under-predicting hits costs some cache reuse; stale
hits would cost it again and again.

A new boot id is a new process with an empty cache and new numbers: everything of the old one is
forgotten, and its late batches are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.policy.kv_index import KvIndex

MAX_HELD_BATCHES = 4096
"""Early batches kept per worker; at one batch per 10 ms step, 40 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksStored:
    block_hashes: list[int]
    parent_hash: int | None
    token_ids: bytes
    """Packed, see baton/contract/tokens.py."""
    namespace: str = ""
    """What separates equal tokens (LoRA adapter, cache salt), or empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksRemoved:
    block_hashes: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllBlocksCleared:
    pass


KvEvent = BlocksStored | BlocksRemoved | AllBlocksCleared


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
    num_lost: int = 0
    """Missing batches that never did; each time the worker's part of the index was cleared."""
    num_malformed: int = 0


@dataclass(slots=True)
class _Feed:
    boot_id: str
    next: int = 0
    held: dict[int, tuple[KvEvent, ...]] = field(default_factory=dict)
    asked: int = 0
    """Batches before this number have been asked for."""


class KvFeeds:
    """The only writer of the index."""

    def __init__(self, index: KvIndex, max_held_batches: int = MAX_HELD_BATCHES) -> None:
        self.counters = FeedCounters()
        self._index = index
        self._max_held = max_held_batches
        self._feeds: dict[int, _Feed] = {}

    def joined(self, slot: int, boot_id: str, *, next_sequence: int = 0) -> None:
        """A worker registered. The same process registering again (a lost connection) keeps what we
        know of it; what was missed meanwhile shows as a gap."""
        feed = self._feeds.get(slot)
        if feed is None:
            self._index.open(slot)
        elif feed.boot_id == boot_id:
            return
        else:
            self._index.clear(slot)
        self._feeds[slot] = _Feed(boot_id, next_sequence, asked=next_sequence)

    def left(self, slot: int) -> None:
        if self._feeds.pop(slot, None) is not None:
            self._index.close(slot)

    def received(
        self, slot: int, boot_id: str, sequence: int, events: tuple[KvEvent, ...]
    ) -> AskReplay | None:
        """A batch, live or replayed: the two need not be told apart."""
        feed = self._feeds.get(slot)
        if feed is None or feed.boot_id != boot_id:
            self.counters.num_late += 1
            return None
        if sequence < feed.next or sequence in feed.held:
            self.counters.num_duplicates += 1
            return None
        if sequence > feed.next:
            feed.held[sequence] = events
            if len(feed.held) > self._max_held:
                self._give_up(slot, feed)
                return None
            first, feed.asked = max(feed.next, feed.asked), max(feed.asked, sequence + 1)
            missing = [n for n in range(first, sequence) if n not in feed.held]
            if not missing:
                return None
            self.counters.num_gaps += 1
            return AskReplay(slot, missing[0], missing[-1])
        if sequence < feed.asked:
            self.counters.num_replayed += 1
        self._apply(slot, feed, events)
        self._apply_held(slot, feed)
        return None

    def replay_ended(self, slot: int, boot_id: str) -> None:
        """The worker has sent all it still had. What is missing now will not come."""
        feed = self._feeds.get(slot)
        if feed is not None and feed.boot_id == boot_id:
            while feed.held:
                self._give_up(slot, feed)

    def _give_up(self, slot: int, feed: _Feed) -> None:
        first = min(feed.held)
        self.counters.num_lost += first - feed.next
        self._index.clear(slot)
        feed.next = first
        self._apply_held(slot, feed)

    def _apply_held(self, slot: int, feed: _Feed) -> None:
        while feed.held and (events := feed.held.pop(feed.next, None)) is not None:
            self._apply(slot, feed, events)

    def _apply(self, slot: int, feed: _Feed, events: tuple[KvEvent, ...]) -> None:
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
