"""Chained block hashes: what they depend on, and that both ways to compute them agree."""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.contract.tokens import pack_token_ids
from baton.policy.prefix_hash import PrefixHasher, PromptHashes

SIZE = 16


def tokens(num_blocks: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2**32) for _ in range(num_blocks * SIZE)]


def chain(hasher: PrefixHasher, ids: list[int]) -> list[int]:
    return hasher.chain(hasher.root(), 0, pack_token_ids(ids), len(ids) // SIZE)


@pytest.mark.parametrize("num_blocks", [1, 2, 4, 5, 64, 65, 1500])
def test_both_ways_and_any_split_give_the_same_values(num_blocks):
    hasher, ids = PrefixHasher(SIZE, 1), tokens(num_blocks)
    whole = chain(hasher, ids)
    value, one_by_one = hasher.root(), []
    for depth in range(num_blocks):
        (value,) = hasher.chain(value, depth, pack_token_ids(ids[depth * SIZE : (depth + 1) * SIZE]), 1)
        one_by_one.append(value)
    assert whole == one_by_one
    prompt = PromptHashes(hasher, pack_token_ids([*ids, 1]))
    assert [prompt.value(depth) for depth in range(1, num_blocks + 1)] == whole
    assert prompt.values(np.array([1, num_blocks])) == [whole[0], whole[-1]]


def test_a_value_depends_on_every_token_up_to_its_block_and_on_none_after():
    hasher, ids = PrefixHasher(SIZE, 1), tokens(6)
    whole = chain(hasher, ids)
    for position in (0, 17, 50, 95):
        changed = ids.copy()
        changed[position] ^= 1
        same = [a == b for a, b in zip(chain(hasher, changed), whole, strict=True)]
        assert same == [block < position // SIZE for block in range(6)]


def test_swapped_repeated_and_zero_blocks_all_differ():
    """What weak chains confuse: order, repetition, and blocks of token 0."""
    hasher = PrefixHasher(SIZE, 1)
    a, b = tokens(1, 1), tokens(1, 2)
    zero = [0] * SIZE
    ends = [chain(hasher, ids)[-1] for ids in (a + b, b + a, a, a + a, zero, zero * 2, zero * 3, a + zero)]
    assert len(set(ends)) == len(ends)


def test_many_prefixes_do_not_collide():
    hasher = PrefixHasher(SIZE, 1)
    values = {value for seed in range(300) for value in chain(hasher, tokens(100, seed))}
    assert len(values) == 30_000


def test_seeds_and_namespaces_separate():
    ids = tokens(2)
    assert chain(PrefixHasher(SIZE, 1), ids) == chain(PrefixHasher(SIZE, 1), ids)
    assert chain(PrefixHasher(SIZE, 1), ids) != chain(PrefixHasher(SIZE, 2), ids)
    assert chain(PrefixHasher(SIZE), ids) != chain(PrefixHasher(SIZE), ids)
    hasher = PrefixHasher(SIZE, 1)
    assert len({hasher.root(), hasher.root("a"), hasher.root("b")}) == 3


def test_a_long_prompt_is_hashed_only_as_far_as_asked():
    prompt = PromptHashes(PrefixHasher(SIZE, 1), pack_token_ids([*tokens(1000), 1]))
    prompt.value(1)
    assert prompt._done == 64
    prompt.value(65)
    assert prompt._done == 256
    prompt.value(1000)
    assert prompt._done == 1000
