"""Both choices for one request, and the record that makes them again."""

from __future__ import annotations

import json
import random

import pytest

from baton.contract.messages import WorkerCapacity
from baton.contract.tokens import pack_token_ids
from baton.policy import explain, registry
from baton.policy.base import RanksOne, RequestFacts
from baton.policy.expectations import Expectations
from baton.policy.kv_index import KvIndex
from baton.policy.ledger import Ledger, Pool
from baton.policy.registry import NAMES, by_name
from baton.policy.router import FEW, Router, best_hit_tokens

BLOCK = 16


class Fleet:
    def __init__(self, num_prefill: int, num_decode: int, prefill_policy: str = "lmetric") -> None:
        capacity = WorkerCapacity(
            num_blocks=1000, max_batch_size=64, max_model_len=10**6, kv_bytes_per_block=1
        )
        self.ledger, self.index = Ledger(), KvIndex(BLOCK, seed=1)
        self.prefill, self.decode = Pool(), Pool()
        for pool, role, num in ((self.prefill, "p", num_prefill), (self.decode, "d", num_decode)):
            for i in range(num):
                account = self.ledger.open(f"{role}{i}", capacity, BLOCK)
                pool.add(account)
                self.index.open(account.slot)
        self.router = Router(
            self.ledger,
            self.prefill,
            self.decode,
            prefill_policy=by_name(prefill_policy),
            decode_policy=by_name("smallest-batch"),
            index=self.index,
            expectations=Expectations(),
        )

    def worker_id(self, slot: int) -> str:
        return self.ledger.account(slot).worker_id

    def hold(self, slot: int, packed: bytes, num_blocks: int) -> None:
        values = self.index.hasher.chain(self.index.hasher.root(), 0, packed, num_blocks)
        self.index.stored(slot, values, None, packed[: num_blocks * BLOCK * 4])


def facts(num_prompt_tokens: int) -> RequestFacts:
    return RequestFacts(num_prompt_tokens=num_prompt_tokens, num_expected_output_tokens=10)


PACKED = pack_token_ids(range(1000, 2000))  # 1,000 tokens: 62 full blocks


def test_one_match_serves_both_choices():
    """The prefill choice follows its cache, the decode choice sees its own workers' hits."""
    fleet = Fleet(3, 2)
    fleet.hold(1, PACKED, 40)
    fleet.hold(4, PACKED, 62)
    hits = fleet.router.known_hits(PACKED)
    assert hits is not None
    assert hits.tokens_by_slot.tolist() == [0, 640, 0, 0, 992]
    assert best_hit_tokens(hits) == 992
    prefill = fleet.router.choose_prefill(facts(1000), hits, 0.0)
    decode = fleet.router.choose_decode(facts(1000), hits, 0.0)
    assert prefill is not None and decode is not None
    assert (fleet.worker_id(prefill.choice.slot), prefill.choice.hit_tokens) == ("p1", 640)
    assert decode.candidates.hit_tokens.tolist() == [0, 992]


def test_a_burst_of_one_prompt_stays_together_until_events_arrive():
    """
    1. the first request goes to an idle worker; nothing of it is stored yet
    2. the second follows it: P = 1000 queued + 8 own, against 1000 elsewhere: 2016 > 1000. Not yet
    3. once the first is computed, 8 * 2 = 16 < 1000: it does, still without any event
    """
    fleet = Fleet(4, 1)
    hits = fleet.router.known_hits(PACKED)
    first = fleet.router.choose_prefill(facts(1000), hits, 0.0)
    assert first is not None
    account = first.choice.account
    account.commit("h1", num_queued_tokens=1000, num_blocks=63)
    fleet.router.committed("h1", first, hits)
    hits = fleet.router.known_hits(PACKED)
    second = fleet.router.choose_prefill(facts(1000), hits, 0.0)
    assert second is not None and second.choice.slot != account.slot
    account.prefill_done("h1")
    third = fleet.router.choose_prefill(facts(1000), fleet.router.known_hits(PACKED), 0.0)
    assert third is not None and (third.choice.slot, third.choice.hit_tokens) == (account.slot, 992)
    fleet.router.worker_left(account.slot)
    assert best_hit_tokens(fleet.router.refreshed(hits)) == 0  # type: ignore[arg-type]


def test_empty_pools_and_no_index_are_answers_too():
    fleet = Fleet(0, 1)
    assert fleet.router.choose_prefill(facts(10), None, 0.0) is None
    blind = Router(
        fleet.ledger,
        fleet.decode,
        fleet.prefill,
        prefill_policy=by_name("lmetric"),
        decode_policy=by_name("smallest-batch"),
    )
    assert blind.known_hits(PACKED) is None
    choice = blind.choose_prefill(facts(10), None, 0.0)
    assert choice is not None and choice.choice.hit_tokens == 0
    assert blind.choose_decode(facts(10), None, 0.0) is None


def test_a_few_workers_are_placed_as_many_are():
    """For every policy that ranks one worker by itself: same workers left out, same best key."""
    names = [name for name in NAMES if isinstance(by_name(name), RanksOne)]
    assert {registry.DEFAULT_PREFILL, registry.DEFAULT_DECODE} <= set(names)
    for case, name in enumerate(names * 100):
        rng, policy = random.Random(case), by_name(name)
        ledger, prefill, decode = Ledger(), Pool(), Pool()
        for i in range(rng.randint(1, 2 * FEW)):
            capacity = WorkerCapacity(
                num_blocks=rng.randint(1, 99), max_batch_size=4, max_model_len=10**6, kv_bytes_per_block=1
            )
            account = ledger.open(f"w{i}", capacity, BLOCK, rng.choice([None, 50, 400]))
            (prefill if rng.random() < 0.5 else decode).add(account)
            for leg in range(rng.randint(0, 4)):
                queued, kv = rng.randint(0, 99), rng.choice([0, 9])
                account.commit(f"h{leg}", num_queued_tokens=queued, num_blocks=1, num_kv_tokens=kv)
        router = Router(ledger, prefill, decode, prefill_policy=policy, decode_policy=policy)
        asked = facts(rng.randint(1, 300))
        made = router.choose_prefill(asked, None, 0.0)
        for choice, placed in (
            (None if made is None else made.choice, router.place_prefill(asked, 0.0)),
            (router.choose_decode(asked, None, 0.0), router.place_decode(asked, 0.0)),
        ):
            assert (choice is None) == (placed is None)
            if choice is not None and placed is not None and choice.num_tied == 1:
                assert placed is choice.account
            elif choice is not None and placed is not None:
                position = choice.candidates.slots.tolist().index(placed.slot)
                assert all(key[position] == key[choice.position] for key in choice.keys)


def test_ties_are_drawn_among_a_few_too():
    fleet = Fleet(4, 1, registry.DEFAULT_PREFILL)
    placed = [fleet.router.place_prefill(facts(10), 0.0) for _ in range(50)]
    assert {account.worker_id for account in placed if account is not None} == {"p0", "p1", "p2", "p3"}


def test_a_policy_with_a_memory_remembers_what_it_placed():
    """Preble has no hits to follow here: what it gave away in its window is what spreads the rest."""
    fleet = Fleet(3, 1, "preble")
    placed = [fleet.router.place_prefill(facts(1000), 0.0) for _ in range(9)]
    ids = [account.worker_id for account in placed if account is not None]
    assert sorted(ids) == sorted(["p0", "p1", "p2"] * 3)


def test_the_same_seed_and_calls_give_the_same_choices():
    def choices() -> list[int]:
        fleet = Fleet(8, 1, "power-of-two")
        made = [fleet.router.choose_prefill(facts(10), None, 0.0) for _ in range(50)]
        return [c.choice.slot for c in made if c is not None]

    assert choices() == choices()
    assert len(set(choices())) > 4


@pytest.mark.parametrize("name", NAMES)
def test_a_logged_decision_is_made_again_from_its_line(name):
    """For every policy, over a random fleet with hits and a past; the fleet then moves on."""
    rng, fleet = random.Random(name), Fleet(9, 1, name)
    for slot in range(9):
        fleet.hold(slot, PACKED, rng.choice([1, 20, 62]))
        for i in range(rng.randint(0, 6)):
            fleet.ledger.account(slot).commit(
                f"h{i}",
                num_queued_tokens=rng.randint(0, 900),
                num_blocks=1,
                num_kv_tokens=rng.randint(0, 900),
            )
    lines = []
    for step in range(20):
        hits = fleet.router.known_hits(PACKED)
        made = fleet.router.choose_prefill(facts(1000), hits, now_s=float(step))
        assert made is not None
        lines.append((json.dumps(explain.record(made.choice, fleet.worker_id)), made.choice.position))
        made.choice.account.commit(f"s{step}", num_queued_tokens=8, num_blocks=1)
        fleet.router.committed(f"s{step}", made, hits)
    for line, position in lines:
        recorded = json.loads(line)
        again = explain.choose_again(recorded)
        assert again.position == position == recorded["position"]
        assert [key.tolist() for key in again.keys] == recorded["terms"]
        assert len(recorded["workers"]) == 9


def test_the_table_shows_all_workers_and_marks_one():
    fleet = Fleet(3, 1)
    fleet.hold(2, PACKED, 62)
    made = fleet.router.choose_prefill(facts(1000), fleet.router.known_hits(PACKED), 0.0)
    assert made is not None
    text = explain.table(explain.record(made.choice, fleet.worker_id)).splitlines()
    columns = ["hit_tokens", "num_legs", "num_queued_tokens", "last_turn", "key1", "key2", "key3"]
    assert text[0].split() == ["worker", *columns]
    assert text[3].split() == [">", "p2", "992", "0", "0", "0", "8", "1", "0"]
    assert text[-1] == "lmetric: p2 for 1000 tokens"
