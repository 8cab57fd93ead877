"""Which computed blocks others may find, and the KV events that tell of them.

Blocks get their names when the step that fills them is planned, as in vLLM. They are told of in runs, one
event for consecutive blocks of a prompt; what the cache forgot is told before what took its place.
"""

from __future__ import annotations

from baton.contract.messages import BlocksRemoved, BlocksStored, KvEvent
from baton.contract.tokens import TOKEN_BYTES
from baton.simulation.kv_cache import PrefixCache
from baton.simulation.legs import Leg
from baton.simulation.settings import SimulatedWorkerSettings


class BlockNames:
    def __init__(self, settings: SimulatedWorkerSettings, cache: PrefixCache) -> None:
        self._settings = settings
        self._cache = cache
        self._events: list[KvEvent] = []

    def take_events(self) -> tuple[KvEvent, ...]:
        """All since the last call, in order."""
        self._tell_forgotten()
        events, self._events = tuple(self._events), []
        return events

    def computed(self, leg: Leg, num_tokens: int) -> None:
        """Others may find the full blocks of the first `num_tokens` of a prompt from now on."""
        settings = self._settings
        if not settings.has_prefix_cache:
            return
        full, hash_tokens = settings.blocks_per_hash, settings.hash_tokens
        hashes, runs, cache = leg.hashes, leg.runs, self._cache
        position = first = leg.num_named
        while position < len(hashes):
            size = full
            if (position + 1) * hash_tokens > num_tokens:
                if num_tokens < leg.num_prompt_tokens:
                    break
                size = (leg.num_prompt_tokens - position * hash_tokens) // settings.block_size_tokens
                if not size:
                    break
            if len(runs) > position:
                run = runs[position]
                if run.name is not None and run.num_blocks < size:
                    leg.num_own_blocks -= size - run.num_blocks
                    run.num_blocks = size
            else:
                taken = cache.name(hashes[position], size)
                if taken is None:
                    break
                run = taken
                leg.num_own_blocks -= size
                runs.append(run)
            if size < full:
                break
            position += 1
            if not settings.has_kv_events or run.is_announced or run.num_blocks < full:
                if first < position - 1:
                    self._tell(leg, first, position - 1)
                first = position
            else:
                run.is_announced = True
        leg.num_named = position
        if first < position:
            self._tell(leg, first, position)

    def _tell(self, leg: Leg, first: int, end: int) -> None:
        num_bytes = self._settings.hash_tokens * TOKEN_BYTES
        event = BlocksStored(
            block_hashes=list(leg.hashes[first:end]),
            parent_hash=leg.hashes[first - 1] if first else None,
            token_ids=leg.packed[first * num_bytes : end * num_bytes],
            namespace=leg.namespace,
        )
        self._tell_forgotten()
        self._events.append(event)

    def _tell_forgotten(self) -> None:
        if self._cache.forgotten:
            self._events.append(BlocksRemoved(block_hashes=self._cache.forgotten))
            self._cache.forgotten = []
