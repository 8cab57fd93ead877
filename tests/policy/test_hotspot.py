"""The guard against one prefix drowning its holders: when it acts, when it lets go, when it keeps out."""

from __future__ import annotations

import heapq
import random

from baton.contract.messages import WorkerCapacity
from baton.contract.tokens import pack_token_ids
from baton.policy.base import RequestFacts
from baton.policy.expectations import Expectations
from baton.policy.hotspot import HotspotGuard
from baton.policy.kv_index import KvIndex
from baton.policy.ledger import Ledger, Pool
from baton.policy.registry import by_name
from baton.policy.router import Router

BLOCK = 16
RESIDENCE_S = 20.0


class Colocated:
    """Workers that compute at once and then decode for twenty seconds: only batch sizes matter."""

    def __init__(self, num_workers: int, guard: HotspotGuard | None, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        capacity = WorkerCapacity(
            num_blocks=10**9, max_batch_size=10**9, max_model_len=10**9, kv_bytes_per_block=1
        )
        self.ledger, self.pool, self.index = Ledger(), Pool(), KvIndex(BLOCK, seed=seed)
        for i in range(num_workers):
            account = self.ledger.open(f"w{i}", capacity, BLOCK)
            self.pool.add(account)
            self.index.open(account.slot)
        self.guard = guard
        self.router = Router(
            self.ledger,
            self.pool,
            self.pool,
            prefill_policy=by_name("lmetric"),
            decode_policy=by_name("smallest-batch"),
            index=self.index,
            expectations=Expectations(),
            guard=guard,
            seed=seed,
        )
        self.leaving: list[tuple[float, int, str]] = []
        self.num_requests = 0
        self.peak_ratio = 0.0

    def tokens(self, num: int) -> list[int]:
        return [self.rng.randrange(128_000) for _ in range(num)]

    def hold(self, slot: int, packed: bytes) -> None:
        """The worker announces all full blocks of a prompt."""
        num_blocks = len(packed) // 4 // BLOCK
        values = self.index.hasher.chain(self.index.hasher.root(), 0, packed, num_blocks)
        self.index.stored(slot, values, None, packed[: num_blocks * BLOCK * 4])

    def request(self, tokens: list[int], now_s: float) -> int:
        while self.leaving and self.leaving[0][0] <= now_s:
            _, slot, name = heapq.heappop(self.leaving)
            self.ledger.account(slot).release(name)
        packed = pack_token_ids(tokens)
        facts = RequestFacts(num_prompt_tokens=len(tokens), num_expected_output_tokens=1)
        hits = self.router.known_hits(packed)
        prefill = self.router.choose_prefill(facts, hits, now_s)
        assert prefill is not None
        self.num_requests += 1
        name = f"h{self.num_requests}"
        account = prefill.choice.account
        account.commit(name, num_queued_tokens=len(tokens) - prefill.choice.hit_tokens, num_blocks=0)
        self.router.committed(name, prefill, hits)
        account.prefill_done(name)
        self.hold(account.slot, packed)
        self.router.leg_ended(name)
        heapq.heappush(self.leaving, (now_s + RESIDENCE_S, account.slot, name))
        batches = [a.num_legs for a in self.pool]
        self.peak_ratio = max(self.peak_ratio, max(batches) * len(batches) / max(sum(batches), 64))
        return account.slot


def burst(guard: HotspotGuard | None, *, share: float = 0.6, hit: float = 0.95, seed: int = 0) -> Colocated:
    """A8: 16 workers, one of them holds the class's prefix; after 20 s of other traffic, 60 s of it."""
    fleet = Colocated(16, guard, seed)
    prefix = fleet.tokens(int(2000 * hit))
    fleet.hold(3, pack_token_ids(prefix))
    now_s = 0.0
    while now_s < 80:
        now_s += fleet.rng.expovariate(16)
        is_class = now_s > 20 and fleet.rng.random() < share
        fleet.request(prefix + fleet.tokens(2000 - len(prefix)) if is_class else fleet.tokens(2000), now_s)
    return fleet


def test_the_guard_bounds_the_hotspot():
    """The note's toy: 8.6 without, 3.9 with. Peak batch over mean batch."""
    without, guarded = burst(None), burst(HotspotGuard())
    assert without.peak_ratio > 6
    assert guarded.peak_ratio <= 4
    assert guarded.guard is not None and guarded.guard.counters.num_acted >= 1


def test_the_guard_lets_go_when_enough_workers_hold_the_prefix():
    fleet = burst(HotspotGuard())
    assert fleet.guard is not None
    counters = fleet.guard.counters
    assert counters.num_released == counters.num_acted and not fleet.guard.is_acting


def test_the_guard_keeps_out_of_traffic_that_balances_itself():
    """A third of the requests share a prefix that half of the workers hold; the rest are sessions."""
    fleet = Colocated(16, HotspotGuard())
    prefix = fleet.tokens(1900)
    for slot in range(8):
        fleet.hold(slot, pack_token_ids(prefix))
    sessions = [fleet.tokens(500) for _ in range(60)]
    now_s = 0.0
    for _ in range(1500):
        now_s += fleet.rng.expovariate(16)
        if fleet.rng.random() < 0.33:
            fleet.request(prefix + fleet.tokens(100), now_s)
        else:
            number = fleet.rng.randrange(60)
            sessions[number] = (sessions[number] + fleet.tokens(60))[:4000]
            fleet.request(sessions[number], now_s)
    assert fleet.guard is not None and fleet.guard.counters.num_acted == 0


def test_few_requests_raise_no_alarm():
    fleet = Colocated(16, HotspotGuard(min_requests=32))
    prefix = fleet.tokens(1900)
    fleet.hold(0, pack_token_ids(prefix))
    for i in range(31):
        fleet.request(prefix + fleet.tokens(100), now_s=i * 0.01)
    assert fleet.guard is not None and fleet.guard.counters.num_alarms == 0


def test_the_window_forgets():
    """Thirty requests now and thirty after the window are not sixty; nothing is kept of either."""
    guard = HotspotGuard(min_requests=32)
    fleet = Colocated(16, guard)
    prefix = fleet.tokens(1900)
    fleet.hold(0, pack_token_ids(prefix))
    for start_s in (0.0, 61.0):
        for i in range(30):
            fleet.request(prefix + fleet.tokens(100), now_s=start_s + i * 0.01)
    assert guard.counters.num_alarms == 0
    fleet.request(fleet.tokens(100), now_s=500.0)
    assert guard._in_window == {} and guard._num_in_window == 1 and len(guard._parts) == 1


def test_one_prefix_for_everybody_is_no_hotspot_once_all_hold_it():
    """x = 1, but |M| = N: a system prompt shared by all is no reason to exclude anybody."""
    fleet = Colocated(4, HotspotGuard())
    prefix = fleet.tokens(1900)
    for slot in range(4):
        fleet.hold(slot, pack_token_ids(prefix))
    for i in range(200):
        fleet.request(prefix + fleet.tokens(100), now_s=i * 0.05)
    assert fleet.guard is not None and fleet.guard.counters.num_alarms == 0
    batches = [account.num_legs for account in fleet.pool]
    assert max(batches) - min(batches) <= 2
