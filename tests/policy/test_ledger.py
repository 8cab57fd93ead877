"""Accounts never go negative, return to zero, and the table always says what the accounts say (A2)."""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.contract.messages import WorkerCapacity, WorkerLoad
from baton.policy.base import RequestFacts
from baton.policy.ledger import Ledger, Pool, WorkerAccount
from baton.policy.room import has_room, num_blocks_wanted, slots_with_prefill_room, slots_with_room

FACTS = RequestFacts(num_prompt_tokens=40, num_expected_output_tokens=20)


def open_worker(
    ledger: Ledger, worker_id: str, *, num_blocks: int = 100, max_batch_size: int = 8
) -> WorkerAccount:
    capacity = WorkerCapacity(
        num_blocks=num_blocks, max_batch_size=max_batch_size, max_model_len=1000, kv_bytes_per_block=1
    )
    return ledger.open(worker_id, capacity, 16)


def computed(total: int) -> WorkerLoad:
    return WorkerLoad(num_prefill_tokens_done=total)


def assert_table_agrees(ledger: Ledger, accounts: list[WorkerAccount]) -> None:
    for account in accounts:
        row = {
            name: int(ledger.column(name)[account.slot])
            for name in (
                "num_queued_tokens",
                "num_legs",
                "num_waiting",
                "num_kv_tokens",
                "num_reserved_blocks",
            )
        }
        assert row == {name: getattr(account, name) for name in row}
        assert min(row.values()) >= 0, row


def test_releasing_twice_or_the_unknown_changes_nothing():
    a = open_worker(Ledger(), "a")
    a.commit("h", num_queued_tokens=40, num_blocks=3, num_kv_tokens=40)
    a.prefill_done("h")
    a.prefill_done("h")
    assert (a.num_queued_tokens, a.num_reserved_blocks, a.num_legs, a.num_waiting) == (0, 3, 1, 0)
    a.release("h")
    a.release("h")
    a.release("never")
    assert (a.num_queued_tokens, a.num_reserved_blocks, a.num_legs, a.num_kv_tokens) == (0, 0, 0, 0)


def test_the_same_leg_cannot_be_committed_twice():
    a = open_worker(Ledger(), "a")
    a.commit("h", num_queued_tokens=1, num_blocks=1)
    with pytest.raises(AssertionError):
        a.commit("h", num_queued_tokens=1, num_blocks=1)


def test_steps_drain_the_queue_oldest_first():
    """
    1. the first report sets the mark: what was computed before we knew the worker is not ours
    2. 60 more tokens: the first leg's 40 and 20 of the second
    """
    a = open_worker(Ledger(), "a")
    a.commit("h1", num_queued_tokens=40, num_blocks=0)
    a.commit("h2", num_queued_tokens=100, num_blocks=0)
    a.observe(computed(5000))
    assert (a.num_queued_tokens, a.num_waiting) == (140, 2)
    a.observe(computed(5060))
    assert (a.num_queued_tokens, a.num_waiting) == (80, 1)
    a.observe(computed(5060))
    assert a.num_queued_tokens == 80


def test_a_leg_that_ends_ahead_of_the_total_does_not_drain_others_twice():
    a = open_worker(Ledger(), "a")
    a.observe(computed(0))
    a.commit("h1", num_queued_tokens=40, num_blocks=0)
    a.commit("h2", num_queued_tokens=100, num_blocks=0)
    a.correct("h1", num_uncached_tokens=40)
    a.prefill_done("h1")
    assert a.num_queued_tokens == 100
    a.observe(computed(40))  # these 40 were h1's
    assert a.num_queued_tokens == 100
    a.observe(computed(70))
    assert a.num_queued_tokens == 70


def test_true_hits_correct_the_prediction():
    """Predicted 40 uncached, the engine finds only 10 to compute, or all 90."""
    a = open_worker(Ledger(), "a")
    a.commit("more", num_queued_tokens=40, num_blocks=0)
    a.correct("more", num_uncached_tokens=10)
    assert a.num_queued_tokens == 10
    a.correct("more", num_uncached_tokens=90)
    assert a.num_queued_tokens == 90
    a.correct("more", num_uncached_tokens=0)
    assert (a.num_queued_tokens, a.num_waiting, a.num_legs) == (0, 0, 1)


def test_output_beyond_the_reservation_is_reserved_as_it_comes():
    a = open_worker(Ledger(), "a")
    a.commit("h", num_queued_tokens=0, num_blocks=3, num_kv_tokens=40)  # 3 blocks hold 48
    a.grow("h", 8)
    assert a.num_reserved_blocks == 3
    a.grow("h", 1)
    assert (a.num_kv_tokens, a.num_reserved_blocks) == (49, 4)
    a.grow("gone", 5)
    a.release("h")
    assert (a.num_kv_tokens, a.num_reserved_blocks) == (0, 0)


def test_late_releases_of_a_lost_worker_do_not_touch_the_one_in_its_place():
    ledger = Ledger()
    lost = open_worker(ledger, "lost")
    lost.commit("h", num_queued_tokens=40, num_blocks=3)
    ledger.close(lost)
    ledger.close(lost)
    heir = open_worker(ledger, "heir")
    assert heir.slot == lost.slot
    heir.commit("g", num_queued_tokens=7, num_blocks=1)
    lost.prefill_done("h")
    lost.release("h")
    assert lost.num_legs == 0
    assert_table_agrees(ledger, [heir])


def test_accounts_survive_the_growth_of_the_table():
    ledger = Ledger()
    accounts = [open_worker(ledger, f"w{i}") for i in range(100)]
    for i, account in enumerate(accounts):
        account.commit("h", num_queued_tokens=i + 1, num_blocks=i)
    assert_table_agrees(ledger, accounts)
    assert ledger.num_slots == 100


def test_a_pool_follows_its_members():
    ledger, pool = Ledger(), Pool()
    a, b = open_worker(ledger, "a"), open_worker(ledger, "b")
    pool.add(b)
    pool.add(a)
    assert pool.slots.tolist() == [1, 0]
    pool.remove(b)
    assert (pool.slots.tolist(), list(pool), len(pool)) == ([0], [a], 1)


@pytest.mark.parametrize("seed", range(30))
def test_any_schedule_ends_at_zero(seed):
    """Commits, steps, corrections, ends, duplicates, unknown ids, lost and returning workers."""
    rng, ledger = random.Random(seed), Ledger()
    accounts = [open_worker(ledger, f"w{i}") for i in range(3)]
    lost: list[WorkerAccount] = []
    totals = {id(a): 0 for a in accounts}
    names: list[str] = []
    for step in range(800):
        position = rng.randrange(3)
        account = accounts[position]
        name = rng.choice(names) if names and rng.random() < 0.9 else f"h{step}"
        act = rng.randrange(8)
        if act <= 1:
            names.append(f"h{step}")
            account.commit(
                f"h{step}",
                num_queued_tokens=rng.choice([0, 1, rng.randint(2, 5000)]),
                num_blocks=rng.randint(0, 30),
                num_kv_tokens=rng.randint(0, 500),
            )
        elif act == 2:
            totals[id(account)] = max(0, totals[id(account)] + rng.randint(-50, 4000))
            account.observe(computed(totals[id(account)]))
        elif act == 3:
            account.correct(name, num_uncached_tokens=rng.randint(0, 5000))
        elif act == 4:
            account.prefill_done(name)
        elif act == 5:
            account.grow(name, rng.randint(0, 40))
        elif act == 6:
            rng.choice([account, *lost]).release(name)
        elif rng.random() < 0.1:
            ledger.close(account)
            lost.append(account)
            accounts[position] = open_worker(ledger, f"w{step}")
            totals[id(accounts[position])] = 0
        assert_table_agrees(ledger, accounts)
    for name in names * 2:
        for account in accounts + lost:
            account.release(name)
    for account in accounts:
        assert (account.num_queued_tokens, account.num_kv_tokens, account.num_reserved_blocks) == (0, 0, 0)
        assert (account.num_legs, account.num_waiting) == (0, 0)
    assert_table_agrees(ledger, accounts)


def test_the_window_over_columns_is_the_window_one_by_one():
    """Fits, is alone though too long, has no window; a pool without windows asks nobody."""
    rng, ledger, pool = random.Random(7), Ledger(), Pool()
    capacity = WorkerCapacity(num_blocks=9, max_batch_size=8, max_model_len=1000, kv_bytes_per_block=1)
    for i in range(40):
        pool.add(ledger.open(f"w{i}", capacity, 16, rng.choice([None, 50, 200])))
    assert pool.has_windows
    for account in pool:
        if rng.random() < 0.7:
            account.commit("h", num_queued_tokens=rng.randint(0, 250), num_blocks=1)
    for num_tokens in range(1, 300, 7):
        asked = RequestFacts(num_prompt_tokens=num_tokens, num_expected_output_tokens=1)
        expected = [a.slot for a in pool if a.has_prefill_room(num_tokens)]
        assert slots_with_prefill_room(asked, ledger, pool).tolist() == expected
    for account in list(pool):
        if account.prefill_window_tokens is not None:
            pool.remove(account)
    assert not pool.has_windows
    assert slots_with_prefill_room(FACTS, ledger, pool).tolist() == pool.slots.tolist()


# ── room ─────────────────────────────────────────────────────────────────────────────────────


def with_room(facts: RequestFacts, ledger: Ledger) -> list[int]:
    found: list[int] = slots_with_room(facts, ledger, np.arange(ledger.num_slots)).tolist()
    return found


def test_room_comes_before_batch():
    """40 + 20 tokens want 4 blocks; a worker of 3 in all serves the request alone, or not at all."""
    ledger = Ledger()
    small, large = open_worker(ledger, "small", num_blocks=3), open_worker(ledger, "large")
    assert (num_blocks_wanted(FACTS, small), num_blocks_wanted(FACTS, large)) == (3, 4)
    assert with_room(FACTS, ledger) == [0, 1]
    small.commit("g", num_queued_tokens=0, num_blocks=1)
    assert with_room(FACTS, ledger) == [1]


def test_a_full_batch_has_no_room():
    ledger = Ledger()
    open_worker(ledger, "x", max_batch_size=1).commit("h", num_queued_tokens=0, num_blocks=1)
    assert with_room(FACTS, ledger) == []


def test_room_over_columns_is_room_one_by_one():
    rng, ledger = random.Random(5), Ledger()
    accounts = [
        open_worker(ledger, f"w{i}", num_blocks=rng.randint(1, 12), max_batch_size=rng.randint(1, 4))
        for i in range(40)
    ]
    for account in accounts:
        for i in range(rng.randint(0, 3)):
            account.commit(f"h{i}", num_queued_tokens=0, num_blocks=rng.randint(0, 4))
    for _ in range(200):
        facts = RequestFacts(
            num_prompt_tokens=rng.randint(1, 200), num_expected_output_tokens=rng.randint(0, 200)
        )
        expected = [
            a.slot
            for a in accounts
            if a.num_legs < a.capacity.max_batch_size
            and num_blocks_wanted(facts, a) <= a.num_unreserved_blocks
        ]
        assert [a.slot for a in accounts if has_room(facts, a)] == expected
        assert with_room(facts, ledger) == expected
