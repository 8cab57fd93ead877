"""An engine's prefix cache in plain Python, announcing itself as vLLM does: the index's oracle.

Physical blocks in one free list, least recently used first; a finished request frees its blocks
last block first; equal blocks are not merged; each physical copy is announced when it fills and
when it is overwritten. A hit is counted by walking from the first block.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

from baton.contract.messages import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from baton.contract.tokens import pack_token_ids

Prefix = tuple[int, ...]


class EngineModel:
    def __init__(self, num_blocks: int, block_size: int, hash_seed: int = 0) -> None:
        self.block_size = block_size
        self._seed = hash_seed
        self._free: OrderedDict[int, Prefix | None] = OrderedDict((i, None) for i in range(num_blocks))
        self._copies: dict[Prefix, int] = {}
        self._running: dict[str, list[tuple[int, Prefix | None]]] = {}
        self.events: list[KvEvent] = []

    def engine_hash(self, prefix: Prefix) -> int:
        return random.Random(f"{self._seed}{prefix}").getrandbits(64)

    def num_hit_blocks(self, tokens: Sequence[int]) -> int:
        most = (len(tokens) - 1) // self.block_size
        for n in range(most):
            if tuple(tokens[: (n + 1) * self.block_size]) not in self._copies:
                return n
        return most

    def start(self, name: str, tokens: Sequence[int]) -> bool:
        """Computes a prompt and keeps its blocks until `finish`. False: no room."""
        size = self.block_size
        hits = self.num_hit_blocks(tokens)
        wanted = [tuple(tokens[: (n + 1) * size]) for n in range(hits)]
        blocks: list[tuple[int, Prefix | None]] = []
        for prefix in wanted:
            shared = next((b for b, held in self._free.items() if held == prefix), None)
            if shared is not None:
                del self._free[shared]
                blocks.append((shared, prefix))
            # else: a running request holds it; sharing is enough, it is freed by that one
        num_new = -(-len(tokens) // size) - hits
        if num_new > len(self._free):
            for taken, held in reversed(blocks):
                self._free[taken] = held
            return False
        new_prefixes = []
        for n in range(hits, hits + num_new):
            block, held = self._free.popitem(last=False)
            if held is not None:
                self._drop(held)
            is_full = (n + 1) * size <= len(tokens)
            new = tuple(tokens[: (n + 1) * size]) if is_full else None
            blocks.append((block, new))
            if new is not None:
                new_prefixes.append(new)
                self._copies[new] = self._copies.get(new, 0) + 1
        if new_prefixes:
            parent = tuple(tokens[: hits * size])
            end = len(new_prefixes[-1])
            self.events.append(
                BlocksStored(
                    block_hashes=[self.engine_hash(p) for p in new_prefixes],
                    parent_hash=self.engine_hash(parent) if parent else None,
                    token_ids=pack_token_ids(tokens[hits * size : end]),
                )
            )
        self._running[name] = blocks
        return True

    def finish(self, name: str, *, is_tail_first: bool = True) -> None:
        blocks = self._running.pop(name)
        for block, held in reversed(blocks) if is_tail_first else blocks:
            self._free[block] = held

    def reset(self) -> None:
        """Only without running requests, as in vLLM."""
        assert not self._running
        self._copies.clear()
        self._free = OrderedDict((block, None) for block in self._free)
        self.events.append(AllBlocksCleared())

    @property
    def running(self) -> list[str]:
        return list(self._running)

    def take_events(self) -> tuple[KvEvent, ...]:
        events, self.events = tuple(self.events), []
        return events

    def _drop(self, prefix: Prefix) -> None:
        self._copies[prefix] -= 1
        if not self._copies[prefix]:
            del self._copies[prefix]
        self.events.append(BlocksRemoved(block_hashes=[self.engine_hash(prefix)]))
