"""Every scorer against an oracle written out by hand, over random states, and the traps by name.

The oracle is the rule as its source states it, one worker at a time, in plain Python. The policy
is the same rule over columns. 1e5 states in all (check A1).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from baton.contract.messages import WorkerCapacity
from baton.policy.base import Candidates, Choice, Policy, RequestFacts, choose
from baton.policy.ledger import Ledger, Pool
from baton.policy.lmetric import LMetric
from baton.policy.preble import Preble
from baton.policy.registry import NAMES, by_name
from baton.policy.slo import LinearStepTime

BLOCK = 16
STATES_PER_ORACLE = 8_400  # 12 oracles x 8,400 = 1e5


@dataclass
class State:
    """One worker as the oracle sees it."""

    queued: int = 0
    legs: int = 0
    waiting: int = 0
    kv: int = 0
    hit: int = 0
    turn: int = 0
    window_tokens: int = 0
    window_requests: int = 0


def candidates(workers: list[State], prompt: int, draw: int = 0, now_s: float = 0.0) -> Candidates:
    """Facts made by hand: a replay needs no ledger, so a test needs none either."""
    made = Candidates(
        RequestFacts(num_prompt_tokens=prompt, num_expected_output_tokens=1),
        None,
        np.arange(len(workers)),
        draw=draw,
        now_s=now_s,
    )
    facts = {
        "hit_tokens": [w.hit for w in workers],
        "num_queued_tokens": [w.queued for w in workers],
        "num_legs": [w.legs for w in workers],
        "num_waiting": [w.waiting for w in workers],
        "num_kv_tokens": [w.kv for w in workers],
        "block_size_tokens": [BLOCK] * len(workers),
        "last_turn": [w.turn for w in workers],
        "window_tokens": [w.window_tokens for w in workers],
        "window_requests": [w.window_requests for w in workers],
    }
    for name, values in facts.items():
        made.given(name, lambda values=values: np.array(values, dtype=np.int64))  # type: ignore[misc]
    return made


def random_state(rng: random.Random) -> tuple[list[State], int]:
    """Small numbers half of the time, so that ties and thresholds are met."""
    scale = rng.choice([1, 40])
    prompt = rng.randint(1, 60 * scale)
    workers = []
    for _ in range(rng.randint(2, 12)):
        legs = rng.randint(0, 2 * scale)
        waiting = rng.randint(0, legs)
        most = (prompt - 1) // BLOCK
        hit = BLOCK * rng.choice([0, rng.randint(0, most), most])
        workers.append(
            State(
                queued=rng.randint(1, 100 * scale) if waiting else 0,
                legs=legs,
                waiting=waiting,
                kv=rng.randint(0, 500 * scale),
                hit=hit,
                turn=rng.randint(0, 5),
                window_tokens=rng.randint(0, 50 * scale),
                window_requests=rng.randint(0, 3 * scale),
            )
        )
    if rng.random() < 0.3:
        workers.insert(rng.randrange(len(workers)), replace(rng.choice(workers)))
    return workers, prompt


def argmins(values: list[Any]) -> set[int]:
    best = min(values)
    return {i for i, value in enumerate(values) if value == best}


def oracle_filter(max_range: int) -> Callable[[list[State], int], set[int]]:
    def best(workers: list[State], prompt: int) -> set[int]:
        counts = [w.legs for w in workers]
        if max(counts) - min(counts) > max_range:
            return argmins(counts)
        return argmins([(-w.hit, w.legs) for w in workers])

    return best


def oracle_cache_aware(workers: list[State], prompt: int) -> set[int]:
    counts = [w.legs for w in workers]
    if max(counts) - min(counts) > 32 and max(counts) > 1.1 * min(counts):
        return argmins(counts)
    if max(w.hit for w in workers) / prompt > 0.5:
        return argmins([(-w.hit, w.legs) for w in workers])
    return argmins(counts)


def oracle_linear(weight: float) -> Callable[[list[State], int], set[int]]:
    def best(workers: list[State], prompt: int) -> set[int]:
        largest = max(w.legs + 1 for w in workers)
        return argmins(
            [
                (weight * (1 - w.hit / prompt) + (1 - weight) * ((w.legs + 1) / largest), w.legs)
                for w in workers
            ]
        )

    return best


def oracle_dynamo(workers: list[State], prompt: int) -> set[int]:
    return argmins(
        [
            max(0.0, (w.queued + prompt) / BLOCK - w.hit // BLOCK)
            + math.ceil(w.kv / BLOCK)
            + math.ceil(prompt / BLOCK)
            for w in workers
        ]
    )


def oracle_preble(workers: list[State], prompt: int) -> set[int]:
    if max(w.hit for w in workers) / prompt > 0.5:
        return argmins([(-w.hit, w.queued + prompt - w.hit) for w in workers])
    return argmins([2.1e-5 * w.window_tokens + 6e-4 * w.window_requests for w in workers])


def oracle_slo(workers: list[State], prompt: int) -> set[int]:
    step = LinearStepTime()

    def ttft_s(w: State) -> float:
        return step.prefill_s + step.prefill_s_per_token * (w.queued + prompt - w.hit)

    def tpot_s(w: State) -> float:
        return (
            step.decode_s
            + step.decode_s_per_sequence * (w.legs + 1)
            + step.decode_s_per_kv_token * (w.kv + prompt)
        )

    feasible = [w for w in workers if ttft_s(w) <= 0.06 and tpot_s(w) <= 0.0062]
    if not feasible:
        return argmins([tpot_s(w) for w in workers])
    return argmins(
        [(-tpot_s(w), w.queued + prompt - w.hit) if w in feasible else (math.inf, 0) for w in workers]
    )


ORACLES: dict[str, Callable[[list[State], int], set[int]]] = {
    "lmetric": lambda ws, n: argmins([((w.queued + n - w.hit) * (w.legs + 1), w.legs, w.turn) for w in ws]),
    "p-token": lambda ws, n: argmins([(w.queued + n - w.hit, w.legs, w.turn) for w in ws]),
    "vllm": lambda ws, n: argmins([4 * w.waiting + (w.legs - w.waiting) for w in ws]),
    "vllm:5": lambda ws, n: argmins([4 * w.waiting + w.legs for w in ws]),
    "linear:0.7": oracle_linear(0.7),
    "linear:0.4": oracle_linear(0.4),
    "filter:8": oracle_filter(8),
    "cache-aware": oracle_cache_aware,
    "dynamo": oracle_dynamo,
    "preble": oracle_preble,
    "slo:0.06,0.0062": oracle_slo,
    "least-request": lambda ws, n: argmins([w.legs for w in ws]),
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_policy_chooses_as_its_rule_says(name):
    rng, policy = random.Random(name), by_name(name)
    seen_ties = 0
    for _ in range(STATES_PER_ORACLE):
        workers, prompt = random_state(rng)
        expected = ORACLES[name](workers, prompt)
        choice = choose(policy, candidates(workers, prompt, draw=rng.getrandbits(48)))
        assert choice is not None
        assert choice.position in expected, (workers, prompt)
        assert choice.num_tied == len(expected)
        seen_ties += len(expected) > 1
    assert seen_ties  # the tie path was tested too


@pytest.mark.parametrize("name", ["fewest-kv-tokens", "smallest-batch"])
def test_decode_policies_rank_by_one_count_and_break_ties_by_the_other(name):
    workers = [State(legs=1, kv=900), State(legs=2, kv=100), State(legs=1, kv=500)]
    assert pick(name, workers) == {"smallest-batch": 2, "fewest-kv-tokens": 1}[name]


def pick(name: str | Policy, workers: list[State], prompt: int = 100, draw: int = 0) -> int:
    policy = by_name(name) if isinstance(name, str) else name
    choice = choose(policy, candidates(workers, prompt, draw=draw))
    assert choice is not None
    return choice.position


# ── what ports of LMetric get wrong (the note's traps 2, 3, 10) ──────────────────────────────


def test_the_queue_belongs_to_p_token():
    """Full hit behind 5,000 queued tokens against an idle worker without the prefix."""
    cached, idle = State(hit=992, queued=5000, legs=1, waiting=1), State()
    # (5000 + 1008) * 2 = 12016 against 1000 * 1; without the queue 8 * 2 = 16 would win.
    assert pick("lmetric", [cached, idle], prompt=1000) == 1
    assert pick("p-token", [cached, idle], prompt=1000) == 1


def test_the_request_itself_belongs_to_the_batch():
    """An idle worker without the prefix against a worker with it and one request: without + 1 the
    idle one scores 0 and wins whatever it lacks."""
    cached, idle = State(hit=992, legs=1), State()
    assert pick("lmetric", [cached, idle], prompt=1000) == 0  # 8 * 2 = 16 < 1000 * 1
    idle_cached = State(hit=992)
    assert pick("lmetric", [idle, idle_cached], prompt=1000) == 1  # both idle: hits still count


def test_a_full_hit_still_costs_something():
    """Hits are capped at prompt - 1, so P is at least 1 and the batch always matters."""
    packed, light = State(hit=992, legs=50), State(hit=992, legs=1)
    assert pick("lmetric", [packed, light], prompt=1000) == 1


def test_exact_ties_are_drawn_not_given_to_the_first():
    """A9: identical full hits everywhere; over many draws every worker is chosen alike."""
    workers = [State(hit=992) for _ in range(8)]
    counts = [0] * 8
    rng = random.Random(1)
    for _ in range(4000):
        counts[pick("lmetric", workers, 1000, draw=rng.getrandbits(48))] += 1
    assert max(counts) < 1.2 * 500 and min(counts) > 0.8 * 500


@pytest.mark.parametrize("name", ["lmetric", "p-token", "smallest-batch"])
def test_with_nothing_in_flight_work_goes_round(name):
    """448 requests, each after the one before it has ended: equal shares, not a draw's."""
    ledger, pool, policy = Ledger(), Pool(), by_name(name)
    for number in range(7):
        capacity = WorkerCapacity(num_blocks=64, max_batch_size=8, max_model_len=512, kv_bytes_per_block=1)
        pool.add(ledger.open(f"w{number}", capacity, BLOCK))
    counts = dict.fromkeys(range(7), 0)
    facts = RequestFacts(num_prompt_tokens=100, num_expected_output_tokens=1)
    rng = random.Random(1)
    for number in range(448):
        choice = choose(policy, Candidates(facts, ledger, pool.slots, draw=rng.getrandbits(48), now_s=0.0))
        assert choice is not None
        choice.account.commit(f"{number}", num_queued_tokens=100, num_blocks=7)
        choice.account.release(f"{number}")
        counts[choice.slot] += 1
    assert set(counts.values()) == {64}


def test_no_candidate_means_wait_and_one_is_not_ranked():
    assert choose(LMetric(), candidates([], 10)) is None
    only = choose(LMetric(), candidates([State(legs=9)], 10))
    assert only is not None and (only.position, only.keys) == (0, ())


# ── invariance (A7) ──────────────────────────────────────────────────────────────────────────


class Scaled:
    """A policy's factors in other units."""

    def __init__(self, p_unit: float, batch_unit: float, is_product: bool) -> None:
        self.name = "scaled"
        self._p, self._b, self._is_product = p_unit, batch_unit, is_product

    def rank(self, c: Candidates) -> tuple[Any, ...]:
        p, b = self._p * c.p_tokens.astype(float), self._b * c.batch.astype(float)
        return (p * b if self._is_product else 0.5 * p + 0.5 * b, c.batch, c.last_turn)

    def committed(self, c: Candidates, position: int) -> None: ...


def test_units_change_no_product_but_change_a_plain_sum():
    rng = random.Random(7)
    num_changed_sums = 0
    for _ in range(2000):
        workers, prompt = random_state(rng)
        unit_p, unit_b = 2.0 ** rng.randint(-20, 20), 2.0 ** rng.randint(-20, 20)  # exact in floats
        assert pick(Scaled(unit_p, unit_b, True), workers, prompt) == pick("lmetric", workers, prompt)
        plain, rescaled = Scaled(1, 1, False), Scaled(unit_p, unit_b, False)
        num_changed_sums += pick(plain, workers, prompt) != pick(rescaled, workers, prompt)
    assert num_changed_sums > 100


# ── policies with a draw or a memory ─────────────────────────────────────────────────────────


def test_round_robin_is_a_cycle_and_a_newcomer_is_next(make_ledger):
    ledger = make_ledger(3)
    order = [commit(ledger, "round-robin").slot for _ in range(6)]
    assert order == [0, 1, 2, 0, 1, 2]
    open_worker(ledger, "late")
    assert [commit(ledger, "round-robin").slot for _ in range(5)] == [3, 0, 1, 2, 3]


def test_random_takes_every_worker_alike():
    rng = random.Random(3)
    counts = [0] * 5
    for _ in range(5000):
        counts[pick("random", [State(legs=9), *[State()] * 4], draw=rng.getrandbits(48))] += 1
    assert max(counts) < 1150 and min(counts) > 850


def test_power_of_two_takes_the_smaller_of_two_different_workers():
    """The longest queue of all is never chosen, each other one sometimes."""
    rng = random.Random(3)
    workers = [State(legs=i) for i in range(4)]
    counts = [0] * 4
    for _ in range(3000):
        counts[pick("power-of-two", workers, draw=rng.getrandbits(48))] += 1
    # Pairs of 4: 6. Worker 0 wins 3 of them, 1 wins 2, 2 wins 1.
    assert counts[3] == 0
    for position, share in enumerate([3 / 6, 2 / 6, 1 / 6]):
        assert abs(counts[position] / 3000 - share) < 0.03


def test_preble_forgets_after_its_window(make_ledger):
    ledger = make_ledger(2)
    preble = Preble()
    facts = RequestFacts(num_prompt_tokens=100, num_expected_output_tokens=1)
    chosen = []
    for now_s in (0.0, 1.0, 2.0, 200.0):
        made = Candidates(facts, ledger, np.arange(2), now_s=now_s)
        choice = choose(preble, made)
        assert choice is not None
        preble.committed(made, choice.position)
        chosen.append(choice.position)
    assert chosen == [0, 1, 0, 0]  # at 200 s both windows are empty: a tie again, drawn as 0
    assert choice is not None
    assert choice.candidates.read["window_tokens"].tolist() == [0, 0]


# ── the registry ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_a_policy_that_names_itself(name):
    policy = by_name(name)
    assert by_name(policy.name).name == policy.name
    assert pick(policy, [State(legs=1), State()]) in (0, 1)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fastest", "no policy is called 'fastest'"),
        ("lmetric:3", "lmetric takes 0 parameters"),
        ("linear:much", "'much' is no float"),
        ("linear:1.5", "expected 0 to 1"),
    ],
)
def test_a_wrong_name_is_refused_in_words(spec, words):
    with pytest.raises(ValueError, match=words):
        by_name(spec)


# ── helpers on a real ledger ─────────────────────────────────────────────────────────────────


def open_worker(ledger: Ledger, worker_id: str) -> None:
    capacity = WorkerCapacity(num_blocks=100, max_batch_size=8, max_model_len=1000, kv_bytes_per_block=1)
    ledger.open(worker_id, capacity, BLOCK)


@pytest.fixture
def make_ledger() -> Callable[[int], Ledger]:
    def make(num_workers: int) -> Ledger:
        ledger = Ledger()
        for i in range(num_workers):
            open_worker(ledger, f"w{i}")
        return ledger

    return make


def commit(ledger: Ledger, name: str) -> Choice:
    facts = RequestFacts(num_prompt_tokens=10, num_expected_output_tokens=1)
    choice = choose(by_name(name), Candidates(facts, ledger, np.arange(ledger.num_slots)))
    assert choice is not None
    choice.account.commit(f"h{ledger.next_turn()}", num_queued_tokens=10, num_blocks=1)
    return choice
