"""What the coordinator believes each worker still has to do.

Polled load is poison to a router: between two polls a burst sees the same idle worker. So every
decision is committed to the worker's account at once, and taken off again when the worker reports
progress, when the request ends, or when the worker is lost. An account never goes negative and
returns to zero with its last leg: each entry is kept per `handoff_id`, so releasing twice, or
releasing what was never committed, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.contract.messages import WorkerCapacity, WorkerLoad


@dataclass(slots=True)
class _Entry:
    num_queued_tokens: int
    num_blocks: int


class WorkerAccount:
    """One worker's commitments: legs in flight, prompt tokens not yet computed, blocks promised."""

    __slots__ = ("_entries", "capacity", "block_size_tokens", "load", "num_queued_tokens",
                 "num_reserved_blocks", "prefill_window_tokens", "worker_id")  # fmt: skip

    def __init__(
        self,
        worker_id: str,
        capacity: WorkerCapacity,
        block_size_tokens: int,
        prefill_window_tokens: int | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.capacity = capacity
        self.block_size_tokens = block_size_tokens
        self.prefill_window_tokens = prefill_window_tokens
        """Prompt tokens the worker wants to have ahead of what it has computed; None: no limit."""
        self.load = WorkerLoad(num_free_blocks=capacity.num_blocks)
        self.num_queued_tokens = 0
        """Uncached prompt tokens committed here and not yet computed."""
        self.num_reserved_blocks = 0
        self._entries: dict[str, _Entry] = {}

    @property
    def num_legs(self) -> int:
        """Batch size: legs running and queued."""
        return len(self._entries)

    @property
    def num_unreserved_blocks(self) -> int:
        return self.capacity.num_blocks - self.num_reserved_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)

    def has_prefill_room(self, num_tokens: int) -> bool:
        """A prompt fits into the window, or is alone."""
        window = self.prefill_window_tokens
        return window is None or not self.num_queued_tokens or self.num_queued_tokens + num_tokens <= window

    def commit(self, handoff_id: str, *, num_queued_tokens: int, num_blocks: int) -> None:
        assert handoff_id not in self._entries, handoff_id
        self._entries[handoff_id] = _Entry(num_queued_tokens, num_blocks)
        self.num_queued_tokens += num_queued_tokens
        self.num_reserved_blocks += num_blocks

    def prefill_done(self, handoff_id: str) -> None:
        """The prompt is computed; the leg itself and its blocks stay until `release`."""
        entry = self._entries.get(handoff_id)
        if entry is not None:
            self.num_queued_tokens -= entry.num_queued_tokens
            entry.num_queued_tokens = 0

    def release(self, handoff_id: str) -> None:
        entry = self._entries.pop(handoff_id, None)
        if entry is not None:
            self.num_queued_tokens -= entry.num_queued_tokens
            self.num_reserved_blocks -= entry.num_blocks
