"""Compute the rest where decode is, or move the KV: what must hold for any fleet."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from baton.policy.stay_or_go import Costs, Pace, Question, Rest, costs
from baton.step_time.linear import LinearStepTime

PREFILL = LinearStepTime(base_s=0.002, per_prefill_token_s=1e-4, per_prefill_pair_s=1e-9)
DECODE = LinearStepTime(
    base_s=0.004, per_prefill_token_s=1e-4, per_prefill_pair_s=1e-9, per_decode_s=1e-5,
    per_context_token_s=1e-8,
)  # fmt: skip
PACE = Pace(prefill=PREFILL, decode=DECODE, handoff_s=0.005, handoff_per_byte_s=1e-9)
QUESTION = Question(
    num_prompt_tokens=1000,
    there=Rest(num_hit_tokens=960, num_queued_tokens=0, num_waiting=0),
    num_decodes=0,
    num_context_tokens=0,
    prefill=Rest(num_hit_tokens=0, num_queued_tokens=0, num_waiting=0),
    num_bytes_to_move=40_000,
)


def test_the_costs_are_these():
    question = replace(
        QUESTION, num_decodes=3, num_context_tokens=3000,
        prefill=Rest(num_hit_tokens=500, num_queued_tokens=2000, num_waiting=2),
    )  # fmt: skip
    parts = costs(question, PACE)
    rest_s = 40 * 1e-4 + 40 * (960 + 20.5) * 1e-9
    assert parts.stay_queue_s == 0.0
    assert parts.stay_step_s == pytest.approx(0.004 + rest_s + 3e-5 + 3e-5)
    assert parts.stay_harm_s == pytest.approx(3 * rest_s)
    assert parts.go_queue_s == pytest.approx(0.002 + 2000 * 1e-4 + 2 * 1000 * 500.5 * 1e-9)
    assert parts.go_compute_s == pytest.approx(0.002 + 500 * 1e-4 + 500 * (500 + 250.5) * 1e-9)
    assert parts.go_handoff_s == pytest.approx(0.005 + 40_000 * 1e-9)
    assert parts.stays


def test_a_cold_prompt_goes_when_others_decode_there():
    cold = replace(QUESTION, there=replace(QUESTION.there, num_hit_tokens=0), num_decodes=8)
    assert not costs(cold, PACE).stays


def test_equal_costs_go():
    assert not Costs(stay_queue_s=0, stay_step_s=1, stay_harm_s=1, go_queue_s=1, go_compute_s=0.5,
                     go_handoff_s=0.5).stays  # fmt: skip


def any_question(rng: random.Random) -> Question:
    num_prompt = rng.randint(2, 20_000)

    def rest() -> Rest:
        num_waiting = rng.choice([0, 0, 1, 5])
        return Rest(
            num_hit_tokens=rng.choice([0, rng.randint(0, num_prompt - 1), num_prompt - 1]),
            num_queued_tokens=rng.randint(num_waiting, 10_000) if num_waiting else 0,
            num_waiting=num_waiting,
        )

    num_decodes = rng.choice([0, 1, 4, 64])
    return Question(
        num_prompt_tokens=num_prompt, there=rest(), num_decodes=num_decodes,
        num_context_tokens=num_decodes * rng.randint(1, 4000), prefill=rest(),
        num_bytes_to_move=rng.randint(0, 10**9),
    )  # fmt: skip


def any_pace(rng: random.Random) -> Pace:
    def step() -> LinearStepTime:
        return LinearStepTime(
            base_s=rng.choice([0.0, 10 ** rng.uniform(-4, -1)]),
            per_prefill_token_s=10 ** rng.uniform(-6, -3),
            per_prefill_pair_s=rng.choice([0.0, 10 ** rng.uniform(-11, -8)]),
            per_decode_s=10 ** rng.uniform(-6, -4),
            per_context_token_s=10 ** rng.uniform(-10, -7),
        )

    return Pace(
        prefill=step(), decode=step(), handoff_s=rng.uniform(0, 0.05),
        handoff_per_byte_s=10 ** rng.uniform(-11, -8),
    )  # fmt: skip


def more_decodes(q: Question, rng: random.Random) -> Question:
    return replace(q, num_decodes=q.num_decodes + rng.randint(1, 8))


def longer_queue_there(q: Question, rng: random.Random) -> Question:
    num = q.there.num_queued_tokens + rng.randint(1, 5000)
    return replace(q, there=replace(q.there, num_queued_tokens=num, num_waiting=max(1, q.there.num_waiting)))


def more_hits_elsewhere(q: Question, rng: random.Random) -> Question:
    most = q.num_prompt_tokens - 1
    return replace(q, prefill=replace(q.prefill, num_hit_tokens=rng.randint(q.prefill.num_hit_tokens, most)))


def fewer_hits_there(q: Question, rng: random.Random) -> Question:
    return replace(q, there=replace(q.there, num_hit_tokens=rng.randint(0, q.there.num_hit_tokens)))


@pytest.mark.parametrize(
    "change", [more_decodes, longer_queue_there, more_hits_elsewhere, fewer_hits_there],
    ids=lambda f: f.__name__,
)  # fmt: skip
@pytest.mark.parametrize("seed", range(40))
def test_what_makes_staying_worse_never_makes_it_chosen(change, seed):
    rng = random.Random(seed)
    for _ in range(25):
        question, pace = any_question(rng), any_pace(rng)
        changed = change(question, rng)
        if not costs(question, pace).stays:
            assert not costs(changed, pace).stays, (question, changed)


@pytest.mark.parametrize("seed", range(40))
def test_a_longer_queue_or_a_slower_wire_never_makes_going_chosen(seed):
    rng = random.Random(seed)
    for _ in range(25):
        question, pace = any_question(rng), any_pace(rng)
        if not costs(question, pace).stays:
            continue
        queued = replace(
            question.prefill,
            num_queued_tokens=question.prefill.num_queued_tokens + rng.randint(1, 5000),
            num_waiting=max(1, question.prefill.num_waiting),
        )
        assert costs(replace(question, prefill=queued), pace).stays
        slower = replace(
            pace, handoff_per_byte_s=pace.handoff_per_byte_s * 2, handoff_s=pace.handoff_s + 0.01
        )
        assert costs(question, slower).stays


def test_no_part_is_negative():
    rng = random.Random(5)
    for _ in range(500):
        parts = costs(any_question(rng), any_pace(rng))
        assert min(parts.stay_queue_s, parts.stay_step_s, parts.stay_harm_s) >= 0.0
        assert min(parts.go_queue_s, parts.go_compute_s, parts.go_handoff_s) >= 0.0
