"""The two choices, on accounts made by hand."""

from __future__ import annotations

import pytest

from baton.contract.messages import WorkerCapacity
from baton.policy.base import RequestFacts, num_blocks_wanted
from baton.policy.fewest_queued_tokens import FewestQueuedTokens
from baton.policy.ledger import WorkerAccount
from baton.policy.smallest_batch import SmallestBatch

FACTS = RequestFacts(num_prompt_tokens=40, num_expected_output_tokens=20)


def account(worker_id: str, *, num_blocks: int = 100, max_batch_size: int = 8) -> WorkerAccount:
    capacity = WorkerCapacity(
        num_blocks=num_blocks, max_batch_size=max_batch_size, max_model_len=1000, kv_bytes_per_block=1
    )
    return WorkerAccount(worker_id, capacity, block_size_tokens=16)


def test_fewest_queued_tokens_counts_tokens_not_requests():
    busy, crowded = account("busy"), account("crowded")
    busy.commit("h1", num_queued_tokens=1000, num_blocks=0)
    for i in range(3):
        crowded.commit(f"c{i}", num_queued_tokens=10, num_blocks=0)
    assert FewestQueuedTokens().choose(FACTS, [busy, crowded]) is crowded


def test_fewest_queued_tokens_breaks_ties_by_legs():
    a, b = account("a"), account("b")
    a.commit("h", num_queued_tokens=0, num_blocks=0)
    assert FewestQueuedTokens().choose(FACTS, [a, b]) is b
    assert FewestQueuedTokens().choose(FACTS, []) is None


def test_smallest_batch_puts_room_before_batch():
    empty_but_full, batch_of_one = account("x", num_blocks=3), account("y")
    batch_of_one.commit("h", num_queued_tokens=0, num_blocks=1)
    assert SmallestBatch().choose(FACTS, [empty_but_full]) is empty_but_full  # alone: its whole cache
    empty_but_full.commit("g", num_queued_tokens=0, num_blocks=1)
    assert SmallestBatch().choose(FACTS, [empty_but_full, batch_of_one]) is batch_of_one


def test_smallest_batch_respects_the_batch_limit():
    only = account("x", max_batch_size=1)
    only.commit("h", num_queued_tokens=0, num_blocks=1)
    assert SmallestBatch().choose(FACTS, [only]) is None


def test_a_request_larger_than_expected_room_is_served_alone():
    small = account("x", num_blocks=3)
    assert num_blocks_wanted(FACTS, small) == 3  # not ceil(60 / 16) = 4
    assert num_blocks_wanted(FACTS, account("y")) == 4


def test_releasing_twice_or_the_unknown_changes_nothing():
    a = account("a")
    a.commit("h", num_queued_tokens=40, num_blocks=3)
    a.prefill_done("h")
    a.prefill_done("h")
    assert (a.num_queued_tokens, a.num_reserved_blocks, a.num_legs) == (0, 3, 1)
    a.release("h")
    a.release("h")
    a.release("never")
    assert (a.num_queued_tokens, a.num_reserved_blocks, a.num_legs) == (0, 0, 0)


def test_the_same_leg_cannot_be_committed_twice():
    a = account("a")
    a.commit("h", num_queued_tokens=1, num_blocks=1)
    with pytest.raises(AssertionError):
        a.commit("h", num_queued_tokens=1, num_blocks=1)
