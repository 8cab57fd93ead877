"""What the coordinator believes each worker still has to do.

Polled load is poison to a router: between two polls a burst sees the same idle worker. So every
decision is committed to the worker's account at once, and taken off again as the engine reports
progress, when the request ends, or when the worker is lost. An account never goes negative and
returns to zero with its last leg: each entry is kept per `handoff_id`, so releasing twice, or
releasing what was never committed, changes nothing.

The accounts of all workers share one table of numbers, a column per quantity and a row per
worker (its *slot*), so that a policy scores a thousand workers with a few vector operations
instead of a thousand attribute look-ups. Each account keeps its own plain integers and writes
them through; the table is what policies read.

Prefill progress: engines report a running total of prompt tokens computed, not whose they were.
They serve first come, first served, so the total is taken off the legs in the order of commit.
When a leg ends before the total says so, what was left of it is remembered and the next tokens of
the total are not charged to others: the sum over all legs stays equal to what the engine has done.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from baton.contract.messages import WorkerCapacity, WorkerLoad

Vector = npt.NDArray[np.int64]

COLUMNS = (
    "num_queued_tokens",
    "num_legs",
    "num_waiting",
    "num_kv_tokens",
    "num_reserved_blocks",
    "num_blocks",
    "max_batch_size",
    "block_size_tokens",
    "last_turn",
    "prefill_window_tokens",
)
_QUEUED, _LEGS, _WAITING, _KV_TOKENS, _RESERVED, _BLOCKS, _MAX_BATCH, _BLOCK_SIZE, _TURN, _WINDOW = range(
    len(COLUMNS)
)
NO_WINDOW = 2**62
"""In the table, for a worker that takes any number of tokens ahead."""


class _Entry:
    __slots__ = ("is_corrected", "num_blocks", "num_drained", "num_kv_tokens", "num_queued_tokens")

    def __init__(self, num_queued_tokens: int, num_blocks: int, num_kv_tokens: int) -> None:
        self.num_queued_tokens = num_queued_tokens
        self.num_blocks = num_blocks
        self.num_kv_tokens = num_kv_tokens
        self.num_drained = 0
        self.is_corrected = False


class WorkerAccount:
    """One worker's commitments. Made by `Ledger.open`; the only writer of its row."""

    __slots__ = ("_ahead", "_cells", "_entries", "_ledger", "_seen_total", "_waiting", "block_size_tokens",
                 "capacity", "last_turn", "load", "num_kv_tokens", "num_queued_tokens", "num_reserved_blocks",
                 "prefill_window_tokens", "slot", "worker_id")  # fmt: skip

    def __init__(
        self,
        ledger: Ledger,
        slot: int,
        worker_id: str,
        capacity: WorkerCapacity,
        block_size_tokens: int,
        prefill_window_tokens: int | None,
        cells: Vector,
    ) -> None:
        self._ledger = ledger
        self.slot = slot
        self.worker_id = worker_id
        self.capacity = capacity
        self.block_size_tokens = block_size_tokens
        self.prefill_window_tokens = prefill_window_tokens
        """Prompt tokens the worker wants to have ahead of what it has computed; None: no limit."""
        self.load = WorkerLoad(num_free_blocks=capacity.num_blocks)
        """The engine's own counters, as last reported; see `observe`."""
        self.num_queued_tokens = 0
        """Uncached prompt tokens committed here and not yet computed."""
        self.num_kv_tokens = 0
        """Tokens whose KV is or will be here: prompts, and output as `grow` reports it."""
        self.num_reserved_blocks = 0
        self._entries: dict[str, _Entry] = {}
        self._waiting: dict[str, _Entry] = {}
        """Legs whose prompt is not computed yet, oldest first."""
        self.last_turn = 0
        """Of its latest commit; 0 before the first."""
        self._seen_total: int | None = None
        self._ahead = 0
        """Tokens of ended legs that the engine's total has yet to account for."""
        self._cells = cells

    @property
    def num_legs(self) -> int:
        """Batch size: legs running and queued."""
        return len(self._entries)

    @property
    def num_waiting(self) -> int:
        """Legs whose prompt is not fully computed."""
        return len(self._waiting)

    @property
    def num_unreserved_blocks(self) -> int:
        return max(0, self.capacity.num_blocks - self.num_reserved_blocks)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)

    def has_prefill_room(self, num_tokens: int) -> bool:
        """So many uncached tokens of a prompt fit into the window, or are alone.
        `room.slots_with_prefill_room` is the same over a whole pool."""
        window = self.prefill_window_tokens
        return window is None or not self.num_queued_tokens or self.num_queued_tokens + num_tokens <= window

    def commit(
        self, handoff_id: str, *, num_queued_tokens: int, num_blocks: int, num_kv_tokens: int = 0
    ) -> None:
        assert handoff_id not in self._entries, handoff_id
        assert num_queued_tokens >= 0 and num_blocks >= 0 and num_kv_tokens >= 0
        entry = self._entries[handoff_id] = _Entry(num_queued_tokens, num_blocks, num_kv_tokens)
        cells = self._cells
        if num_queued_tokens:
            self._waiting[handoff_id] = entry
            self.num_queued_tokens += num_queued_tokens
            cells[_QUEUED] = self.num_queued_tokens
            cells[_WAITING] = len(self._waiting)
        if num_blocks:
            self.num_reserved_blocks += num_blocks
            cells[_RESERVED] = self.num_reserved_blocks
        if num_kv_tokens:
            self.num_kv_tokens += num_kv_tokens
            cells[_KV_TOKENS] = self.num_kv_tokens
        cells[_LEGS] = len(self._entries)
        self.last_turn = cells[_TURN] = self._ledger.next_turn()

    def observe(self, load: WorkerLoad) -> bool:
        """Counters of one engine step or heartbeat; prefill progress is drained from the queue. True:
        some was."""
        self.load = load
        before, total = self._seen_total, load.num_prefill_tokens_done
        self._seen_total = total
        # The first report only sets the mark: the worker may have served an earlier coordinator.
        if before is None or total <= before or not self._waiting:
            return False
        computed = total - before
        skipped = min(self._ahead, computed)
        self._ahead -= skipped
        self._drain(computed - skipped)
        return computed > skipped

    def _drain(self, num_tokens: int) -> None:
        while num_tokens > 0 and self._waiting:
            handoff_id, entry = next(iter(self._waiting.items()))
            done = min(num_tokens, entry.num_queued_tokens)
            num_tokens -= done
            self._take_off(handoff_id, entry, done)

    def _take_off(self, handoff_id: str, entry: _Entry, num_tokens: int) -> None:
        entry.num_queued_tokens -= num_tokens
        entry.num_drained += num_tokens
        self.num_queued_tokens -= num_tokens
        self._cells[_QUEUED] = self.num_queued_tokens
        if not entry.num_queued_tokens and self._waiting.pop(handoff_id, None) is not None:
            self._cells[_WAITING] = len(self._waiting)
            if not self._waiting:
                self._ahead = 0

    def correct(self, handoff_id: str, *, num_uncached_tokens: int) -> None:
        """The engine's truth about a leg's hits: what of its prompt it computes itself."""
        entry = self._entries.get(handoff_id)
        if entry is None or handoff_id not in self._waiting:
            return
        entry.is_corrected = True
        left = max(0, num_uncached_tokens - entry.num_drained)
        self.num_queued_tokens += left - entry.num_queued_tokens
        entry.num_queued_tokens = left
        self._take_off(handoff_id, entry, 0)

    def prefill_done(self, handoff_id: str) -> None:
        """The prompt is computed; the leg itself and its blocks stay until `release`."""
        entry = self._waiting.get(handoff_id)
        if entry is not None:
            if entry.is_corrected:
                self._ahead += entry.num_queued_tokens
            self._take_off(handoff_id, entry, entry.num_queued_tokens)

    def grow(self, handoff_id: str, num_tokens: int) -> None:
        """Output tokens of a leg. Beyond what was reserved for it, its reservation grows along."""
        entry = self._entries.get(handoff_id)
        if entry is None:
            return
        entry.num_kv_tokens += num_tokens
        self.num_kv_tokens += num_tokens
        self._cells[_KV_TOKENS] = self.num_kv_tokens
        missing = self.num_blocks_for(entry.num_kv_tokens) - entry.num_blocks
        if missing > 0:
            entry.num_blocks += missing
            self.num_reserved_blocks += missing
            self._cells[_RESERVED] = self.num_reserved_blocks

    def release(self, handoff_id: str) -> None:
        entry = self._entries.pop(handoff_id, None)
        if entry is None:
            return
        cells = self._cells
        if self._waiting.pop(handoff_id, None) is not None:
            self.num_queued_tokens -= entry.num_queued_tokens
            cells[_QUEUED] = self.num_queued_tokens
            cells[_WAITING] = len(self._waiting)
            if not self._waiting:
                self._ahead = 0
        if entry.num_blocks:
            self.num_reserved_blocks -= entry.num_blocks
            cells[_RESERVED] = self.num_reserved_blocks
        if entry.num_kv_tokens:
            self.num_kv_tokens -= entry.num_kv_tokens
            cells[_KV_TOKENS] = self.num_kv_tokens
        cells[_LEGS] = len(self._entries)

    def move_to(self, cells: Vector) -> None:
        """For the ledger: its table has grown, or this account has left it."""
        self._cells = cells


class Ledger:
    """The accounts of a whole fleet, both roles, as one table."""

    def __init__(self) -> None:
        self._table: Vector = np.zeros((len(COLUMNS), 16), dtype=np.int64)
        self._accounts: list[WorkerAccount | None] = []
        self._free_slots: list[int] = []
        self._num_turns = 0

    @property
    def num_slots(self) -> int:
        """Length of every column; closed slots in it are zero."""
        return len(self._accounts)

    def next_turn(self) -> int:
        """Commits are numbered over the whole fleet, so that "least recently chosen" is a column."""
        self._num_turns += 1
        return self._num_turns

    def column(self, name: str) -> Vector:
        """A live view, to be read at once; a commit changes it, a new worker may replace it."""
        return self._table[_COLUMN_NUMBER[name], : len(self._accounts)]

    def gather(self, name: str, slots: Vector) -> Vector:
        """A copy of the rows `slots`: what a decision reads, unchanged by what is committed later."""
        rows: Vector = self._table[_COLUMN_NUMBER[name]].take(slots)
        return rows

    def rows(self, slots: Vector) -> Vector:
        """As `gather`, for all columns at once, in the order of COLUMNS."""
        rows: Vector = self._table.take(slots, axis=1)
        return rows

    def account(self, slot: int) -> WorkerAccount:
        account = self._accounts[slot]
        assert account is not None, f"slot {slot} is closed"
        return account

    def open(
        self,
        worker_id: str,
        capacity: WorkerCapacity,
        block_size_tokens: int,
        prefill_window_tokens: int | None = None,
    ) -> WorkerAccount:
        if self._free_slots:
            slot = heapq.heappop(self._free_slots)
        else:
            slot = len(self._accounts)
            self._accounts.append(None)
            if slot == self._table.shape[1]:
                self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
                for other in self._accounts:
                    if other is not None:
                        other.move_to(self._table[:, other.slot])
        cells = self._table[:, slot]
        cells[:] = 0
        cells[_BLOCKS] = capacity.num_blocks
        cells[_MAX_BATCH] = capacity.max_batch_size
        cells[_BLOCK_SIZE] = block_size_tokens
        cells[_WINDOW] = NO_WINDOW if prefill_window_tokens is None else prefill_window_tokens
        account = WorkerAccount(
            self, slot, worker_id, capacity, block_size_tokens, prefill_window_tokens, cells
        )
        self._accounts[slot] = account
        return account

    def close(self, account: WorkerAccount) -> None:
        """The worker is gone. Late releases of its legs touch nobody: its row may be another's soon."""
        if self._accounts[account.slot] is not account:
            return
        self._table[:, account.slot] = 0
        self._accounts[account.slot] = None
        heapq.heappush(self._free_slots, account.slot)
        account.move_to(np.zeros(len(COLUMNS), dtype=np.int64))


_COLUMN_NUMBER = {name: number for number, name in enumerate(COLUMNS)}


class Pool:
    """The workers that take new legs of one phase, in the order they joined."""

    __slots__ = ("_accounts", "_slots", "has_windows")

    def __init__(self) -> None:
        self.has_windows = False
        """Some member limits the prompt tokens ahead of it."""
        self._accounts: list[WorkerAccount] = []
        self._slots: Vector | None = None

    def __iter__(self) -> Iterator[WorkerAccount]:
        return iter(self._accounts)

    def __len__(self) -> int:
        return len(self._accounts)

    def __getitem__(self, position: int) -> WorkerAccount:
        return self._accounts[position]

    @property
    def slots(self) -> Vector:
        if self._slots is None:
            self._slots = np.array([account.slot for account in self._accounts], dtype=np.int64)
        return self._slots

    def add(self, account: WorkerAccount) -> None:
        self._accounts.append(account)
        self._changed()

    def remove(self, account: WorkerAccount) -> None:
        self._accounts.remove(account)
        self._changed()

    def _changed(self) -> None:
        self._slots = None
        self.has_windows = any(account.prefill_window_tokens is not None for account in self._accounts)
