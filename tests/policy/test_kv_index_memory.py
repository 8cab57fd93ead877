"""Bytes per block as stated, and no growth under churn."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from baton.contract.tokens import pack_token_ids
from baton.policy.kv_index import BYTES_PER_BLOCK, KvIndex

SIZE = 16
BLOCKS = 64


def chain(index: KvIndex, slot: int, rng: random.Random) -> list[int]:
    names = [rng.getrandbits(64) for _ in range(BLOCKS)]
    tokens = [rng.randrange(128_000) for _ in range(BLOCKS * SIZE)]
    index.stored(slot, names, None, pack_token_ids(tokens))
    return names


def test_a_block_takes_what_is_stated():
    """At a size where both dictionaries have just grown (worst) and just before (best)."""
    rng, per_block = random.Random(1), []
    tracemalloc.start()
    try:
        index = KvIndex(SIZE, seed=1)
        for slot in range(8):
            index.open(slot)
        before, _ = tracemalloc.get_traced_memory()
        for number in range(1, 1000):
            chain(index, number % 8, rng)
            if number >= 300:
                per_block.append((tracemalloc.get_traced_memory()[0] - before) / index.num_blocks)
    finally:
        tracemalloc.stop()
    assert max(per_block) <= BYTES_PER_BLOCK
    assert min(per_block) > 0.5 * BYTES_PER_BLOCK


@pytest.mark.parametrize("is_evicting", [True, False], ids=["cap", "engines-evict"])
def test_churn_leaves_nothing_behind(is_evicting):
    """
    1. ten times more unique prompts than fit, workers restarting and leaving in between
    2. every table is back to the size of what is held
    """
    rng = random.Random(2)
    index = KvIndex(SIZE, seed=1, max_bytes=40 * BLOCKS * BYTES_PER_BLOCK if is_evicting else 10**9)
    held: dict[int, list[list[int]]] = {slot: [] for slot in range(4)}
    for slot in held:
        index.open(slot)
    for number in range(400):
        slot = rng.randrange(4)
        held[slot].append(chain(index, slot, rng))
        if not is_evicting and len(held[slot]) > 10:
            index.removed(slot, reversed(held[slot].pop(0)))
        if number % 50 == 49:
            index.close(slot)
            index.open(slot)
            held[slot].clear()
    while not index.sweep(1000):
        pass
    assert index.num_blocks <= 44 * BLOCKS
    assert len(index._by_engine_hash) == index.num_blocks
    assert len(index._leaves) <= 44
    assert len(index._slot_of_bit) <= 8
    assert not index._copies and not index._detached and not index._aliases and not index._own_names
    assert index.num_bytes == index.num_blocks * BYTES_PER_BLOCK
