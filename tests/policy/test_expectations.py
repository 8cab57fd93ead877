"""Prompts on their way: seen at once, forgotten on time, never overstated."""

from __future__ import annotations

import random

import pytest

from baton.contract.tokens import pack_token_ids
from baton.policy.expectations import Expectations, checkpoints
from baton.policy.prefix_hash import PrefixHasher, PromptHashes

SIZE = 4
HASHER = PrefixHasher(SIZE, 1)


def prompt(ids: list[int]) -> PromptHashes:
    return PromptHashes(HASHER, pack_token_ids(ids))


def text(num_blocks: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(num_blocks * SIZE)]


def found(expectations: Expectations, ids: list[int]) -> dict[int, int]:
    return dict(expectations.match(prompt(ids)))


def test_a_burst_of_one_prompt_is_seen_before_any_event():
    expectations, ids = Expectations(), [*text(37), 1]
    expectations.expect("h1", 3, prompt(ids), now_s=0.0)
    assert found(expectations, ids) == {3: 37}
    expectations.expect("h2", 5, prompt(ids), now_s=0.0)
    assert found(expectations, ids) == {3: 37, 5: 37}
    expectations.settle("h1")
    expectations.settle("h1")
    assert found(expectations, ids) == {5: 37}
    expectations.settle("h2")
    assert found(expectations, ids) == {} and not expectations._slots_at


def test_two_prompts_at_one_worker_are_settled_one_by_one():
    expectations, ids = Expectations(), [*text(8), 1]
    for name in ("h1", "h2"):
        expectations.expect(name, 3, prompt(ids), now_s=0.0)
    expectations.settle("h1")
    assert found(expectations, ids) == {3: 8}


def test_what_is_not_confirmed_expires():
    expectations, ids = Expectations(ttl_s=10), [*text(5), 1]
    expectations.expect("h1", 0, prompt(ids), now_s=0.0)
    expectations.expect("h2", 1, prompt(ids), now_s=6.0)
    expectations.expire(12.0)
    assert (found(expectations, ids), expectations.num_expired) == ({1: 5}, 1)


def test_a_lost_worker_is_expected_to_hold_nothing():
    expectations, ids = Expectations(), [*text(5), 1]
    expectations.expect("h1", 0, prompt(ids), now_s=0.0)
    expectations.expect("h2", 1, prompt(ids), now_s=0.0)
    expectations.forget(0)
    assert found(expectations, ids) == {1: 5}
    assert len(expectations) == 1


@pytest.mark.parametrize("num_blocks", [1, 2, 14, 15, 16, 17, 31, 32, 33, 100, 3750])
def test_checkpoints_are_dense_enough(num_blocks):
    depths = checkpoints(num_blocks).tolist()
    assert depths == sorted(set(depths)) and depths[0] == 1 and depths[-1] <= num_blocks
    for low, high in zip(depths, [*depths[1:], num_blocks], strict=True):
        assert high - low <= max(1, high / 8)
    assert len(depths) < 90


def test_a_shared_beginning_is_never_overstated_and_at_most_an_eighth_short():
    rng = random.Random(4)
    base = text(400)
    expectations = Expectations()
    expectations.expect("h", 0, prompt([*base, 1]), now_s=0.0)
    for _ in range(200):
        shared = rng.randint(0, 400)
        ids = base[: shared * SIZE] + text(rng.randint(1, 300), seed=rng.randrange(10**6)) + [1]
        assert shared * 7 / 8 <= found(expectations, ids).get(0, 0) <= shared


def test_a_shorter_prompt_inside_a_longer_one_is_found():
    expectations, base = Expectations(), text(100)
    expectations.expect("h", 0, prompt([*base, 1]), now_s=0.0)
    assert found(expectations, [*base[: 20 * SIZE], 1]) == {0: 20}
    assert found(expectations, [1]) == {}
