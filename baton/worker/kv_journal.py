"""The worker's changes of prefix cache, numbered, and whatever a coordinator may ask for again.

Batches are numbered from 0 at the worker's boot, whether somebody listens or not. The latest ones
are kept, a bounded number of tokens of them, to answer a gap. Beside them the journal mirrors what
the engine's cache holds now (the blocks' names, parents, tokens and number of copies: some 400 bytes a
block), so that a coordinator that is new, or has missed more than is kept, is told all of it again:
a *fresh start*, whose first batch says "forget what came before". Fresh starts take numbers as any
other batch does, so what the engine does meanwhile comes after them in order.

Blocks whose parent the engine has dropped are no hits (a hit begins at block 0) and are left out of
a fresh start. No I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from baton.contract.messages import BlocksRemoved, BlocksStored, KvEvent
from baton.contract.tokens import num_token_ids

MAX_KEPT_TOKENS = 4_000_000
"""Of the kept batches: 16 MB."""
MAX_KEPT_BATCHES = 10_000

BLOCKS_PER_BATCH = 1_024
"""Of a fresh start: a few milliseconds of the coordinator's time each."""


@dataclass(frozen=True, slots=True)
class Batch:
    sequence: int
    events: list[KvEvent]
    is_fresh_start: bool = False


@dataclass(slots=True)
class _Block:
    parent_hash: int | None
    token_ids: bytes
    namespace: str
    num_copies: int = 1


class KvJournal:
    def __init__(
        self, *, max_kept_batches: int = MAX_KEPT_BATCHES, max_kept_tokens: int = MAX_KEPT_TOKENS
    ) -> None:
        self._max_kept_batches = max_kept_batches
        self._max_kept_tokens = max_kept_tokens
        self._next = 0
        self._kept: deque[Batch] = deque()
        self._num_kept_tokens = 0
        self._blocks: dict[int, _Block] = {}

    @property
    def num_blocks(self) -> int:
        """Different ones."""
        return len(self._blocks)

    def append(self, events: list[KvEvent]) -> Batch:
        """The next batch, as it goes on the wire."""
        for event in events:
            self._mirror(event)
        return self._number(events)

    def again(self, first: int, last: int) -> list[Batch]:
        """Batches first to last as they were, or a fresh start if the first is not kept any more. One
        that was never made needs no answer."""
        if first >= self._next:
            return []
        if not self._kept or first < self._kept[0].sequence:
            return self.fresh_start()
        return [batch for batch in self._kept if first <= batch.sequence <= last]

    def fresh_start(self) -> list[Batch]:
        """All that the cache holds. Empty if nothing was ever told: then there is nothing to forget."""
        if not self._next:
            return []
        parts = list(self._parts())
        return [
            self._number(events, is_fresh_start=number == 0) for number, events in enumerate(parts or [[]])
        ]

    def _number(self, events: list[KvEvent], *, is_fresh_start: bool = False) -> Batch:
        batch = Batch(self._next, events, is_fresh_start)
        self._next += 1
        self._kept.append(batch)
        self._num_kept_tokens += _num_tokens(batch)
        # The latest stays whatever its size: a gap is usually one batch wide.
        while len(self._kept) > 1 and (
            len(self._kept) > self._max_kept_batches or self._num_kept_tokens > self._max_kept_tokens
        ):
            self._num_kept_tokens -= _num_tokens(self._kept.popleft())
        return batch

    def _mirror(self, event: KvEvent) -> None:
        blocks = self._blocks
        if isinstance(event, BlocksStored):
            parent = event.parent_hash
            size = len(event.token_ids) // max(1, len(event.block_hashes))
            for number, block_hash in enumerate(event.block_hashes):
                block = blocks.get(block_hash)
                if block is not None:
                    block.num_copies += 1
                else:
                    tokens = event.token_ids[number * size : (number + 1) * size]
                    blocks[block_hash] = _Block(parent, tokens, event.namespace)
                parent = block_hash
        elif isinstance(event, BlocksRemoved):
            for block_hash in event.block_hashes:
                block = blocks.get(block_hash)
                if block is None:
                    continue
                block.num_copies -= 1
                if not block.num_copies:
                    del blocks[block_hash]
        else:
            blocks.clear()

    def _parts(self) -> Iterator[list[KvEvent]]:
        """Parents before children, runs of blocks as one event, BLOCKS_PER_BATCH at a time."""
        part: list[KvEvent] = []
        num_in_part = 0
        for run in self._runs():
            for start in range(0, len(run), BLOCKS_PER_BATCH):
                names = run[start : start + BLOCKS_PER_BATCH]
                first = self._blocks[names[0]]
                whole = BlocksStored(
                    block_hashes=names,
                    parent_hash=first.parent_hash,
                    token_ids=b"".join(self._blocks[name].token_ids for name in names),
                    namespace=first.namespace,
                )
                part.append(whole)
                part += [copy for name in names for copy in self._further_copies(name)]
                num_in_part += len(names)
                if num_in_part >= BLOCKS_PER_BATCH:
                    yield part
                    part, num_in_part = [], 0
        if part:
            yield part

    def _further_copies(self, name: int) -> list[BlocksStored]:
        block = self._blocks[name]
        one = BlocksStored(
            block_hashes=[name],
            parent_hash=block.parent_hash,
            token_ids=block.token_ids,
            namespace=block.namespace,
        )
        return [one] * (block.num_copies - 1)

    def _runs(self) -> Iterator[list[int]]:
        """Chains without branches, each after the one it continues."""
        children: dict[int | None, list[int]] = {}
        for name, block in self._blocks.items():
            children.setdefault(block.parent_hash, []).append(name)
        starts = list(children.get(None, ()))
        while starts:
            run = [starts.pop()]
            while len(following := children.get(run[-1], [])) == 1:
                run += following
            starts += following
            yield run


def _num_tokens(batch: Batch) -> int:
    return sum(num_token_ids(event.token_ids) for event in batch.events if isinstance(event, BlocksStored))
