"""Workers that serve both phases: alone, among themselves, and beside prefill and decode workers."""

from __future__ import annotations

import random

import pytest

from baton.contract.errors import NoWorkers, ServingError
from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    WorkerLoad,
)
from baton.contract.tokens import unpack_token_ids

P, D, B = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH


@pytest.fixture
def both(make_bench):
    """Two workers, each for both phases."""
    bench = make_bench()
    bench.add("b0", B)
    bench.add("b1", B)
    return bench


def test_a_request_is_one_decode_leg_that_computes_its_prompt(both):
    """
    1. submitted: one leg, no prefill message, nothing to fetch
    2. its first token ends the prefill phase; there is no hand-off phase
    3. it ends: hits as the engine counted them, no KV moved, nothing held
    """
    sink = both.submit("r", max_tokens=3, seed=1)
    assert both.take(StartPrefill) == []
    ((worker, leg),) = both.take(StartDecode)
    assert leg.kv_source is None and unpack_token_ids(leg.prompt_token_ids) == [*range(20)]
    assert leg.sampling.max_tokens == 3
    account = both.worker(worker).account
    assert (account.num_legs, account.num_queued_tokens, account.num_waiting) == (1, 20, 1)

    both.now_s = 1.0
    both.step(worker, leg.handoff_id, 7)
    assert (account.num_queued_tokens, account.num_waiting) == (0, 0)
    placement = sink.placements[0]
    assert placement.prefill_worker == placement.decode_worker == worker
    assert (placement.first_token_by, placement.first_token_reason) == (D, "one worker for both phases")

    both.now_s = 1.5
    last = SequenceDelta(leg.handoff_id, [8, 9], "yy", "length", num_cached_tokens=16)
    both.perform(
        both.core.step(both.worker(worker), StepOutputs(deltas=[last], load=WorkerLoad()), both.now_s)
    )
    (report,) = sink.reports
    assert (report.num_output_tokens, report.num_cached_tokens, report.kv_bytes) == (3, 16, 0)
    times = report.phases
    assert (times.queue_s, times.prefill_s, times.handoff_s, times.decode_s) == (0.0, 1.0, 0.0, 0.5)
    both.assert_nothing_is_held()


def test_running_sequences_count_in_the_batch(both):
    """b0 decodes two short prompts, b1 computes a longer one: 20 x (2 + 1) < (30 + 20) x (1 + 1)."""
    workers = []
    for name in ("r0", "r1", "r2"):
        both.submit(name, num_prompt_tokens=30)
        ((worker, leg),) = both.take(StartDecode)
        workers.append((worker, leg))
    (first, leg0), (second, leg1), (third, leg2) = workers
    assert first != second
    crowded = third
    for worker, leg in ((first, leg0), (second, leg1), (third, leg2)):
        if worker == crowded:
            both.step(worker, leg.handoff_id, 1)
    both.submit("r3", num_prompt_tokens=20)
    ((worker, _),) = both.take(StartDecode)
    assert worker == crowded  # 20 x 3 = 60 against 50 x 2 = 100


def test_one_worker_makes_a_fleet_ready(make_bench):
    bench = make_bench()
    with pytest.raises(NoWorkers, match="no prefill and no decode worker"):
        bench.submit("r")
    bench.add("b0", B)
    assert bench.core.facts().is_ready
    bench.core.worker_leaving(bench.worker("b0"))
    assert not bench.core.facts().is_ready
    with pytest.raises(NoWorkers):
        bench.submit("r")


def test_one_token_is_a_prefill_leg(both):
    sink = both.submit("r", max_tokens=1)
    ((worker, leg),) = both.take(StartPrefill)
    assert not leg.keep_kv
    both.finish_prefill(worker, leg.handoff_id, finish="length")
    assert sink.reports[0].outcome is Outcome.COMPLETED
    both.assert_nothing_is_held()


def test_prompt_logprobs_come_from_the_leg_that_computes_the_prompt(both):
    sink = both.submit("r", max_tokens=2, prompt_logprobs=1)
    ((worker, leg),) = both.take(StartDecode)
    assert leg.sampling.prompt_logprobs == 1
    last = SequenceDelta(leg.handoff_id, [8, 9], "yy", "length", prompt_logprobs=[None])
    both.perform(both.core.step(both.worker(worker), StepOutputs(deltas=[last], load=WorkerLoad()), 0.0))
    assert sink.reports[0].prompt_logprobs == [None]


def test_an_abort_while_the_prompt_is_computed_reaches_the_worker(both):
    both.submit("r")
    ((worker, leg),) = both.take(StartDecode)
    both.perform(both.core.abort("r", 0.1))
    assert both.take(AbortLeg) == [(worker, AbortLeg(handoff_id=leg.handoff_id))]
    both.assert_nothing_is_held()


def test_a_lost_worker_s_request_is_computed_by_the_other(both):
    sink = both.submit("r", max_tokens=2)
    ((lost, _),) = both.take(StartDecode)
    both.perform(both.core.worker_lost(lost, "silent", 1.0))
    ((worker, leg),) = both.take(StartDecode)
    assert worker != lost and leg.kv_source is None
    both.step(worker, leg.handoff_id, 1, 2, finish="length")
    assert (sink.reports[0].outcome, sink.reports[0].placement.num_attempts) == (Outcome.COMPLETED, 2)
    both.assert_nothing_is_held()


def test_a_retry_among_two_roles_gets_its_first_token_by_the_rules_of_hand_offs(make_bench):
    """A prompt that failed on one worker for both phases is prefilled and handed off next time."""
    bench = make_bench()
    bench.add("b0", B)
    sink = bench.submit("r")
    ((_, _),) = bench.take(StartDecode)
    bench.add("p0", P)
    bench.add("d0", D)
    bench.perform(bench.core.worker_lost("b0", "silent", 1.0))
    ((_, prefill),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", prefill.handoff_id, token_id=7)
    assert sink.token_ids == [7]
    assert sink.placements[0].first_token_by is P


def test_in_a_mixed_fleet_only_what_lands_on_one_worker_stays_there(make_bench):
    """
    1. one prefill worker busy with a long prompt, one worker for both: the short prompt goes to the
       latter for both phases: one leg
    2. one decode worker, b0 full of legs: prefill at b0, decode at d0 is a hand-off
    """
    bench = make_bench()
    bench.add("p0", P)
    bench.add("b0", B, num_blocks=1000)
    bench.submit("long", num_prompt_tokens=400)
    started = bench.take(StartPrefill) + bench.take(StartDecode)
    bench.submit("short", num_prompt_tokens=10)
    started += bench.take(StartPrefill) + bench.take(StartDecode)
    kinds = sorted((worker, type(message).__name__) for worker, message in started)
    assert kinds == [("b0", "StartDecode"), ("p0", "StartPrefill")]

    bench = make_bench()
    bench.add("d0", D)
    bench.add("b0", B, max_batch_size=1)
    bench.submit("r0")
    bench.submit("r1")
    starts = bench.take(StartPrefill)
    assert {worker for worker, _ in starts} == {"b0"}  # the only one that prefills
    assert any(message.keep_kv for _, message in starts)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("roles", ["bb", "pdb", "pbb"])
def test_every_request_ends_once_whatever_happens(make_bench, roles, seed):
    rng = random.Random(seed)
    bench = make_bench(max_queued=20)
    role_of = {f"{letter}{i}": {"p": P, "d": D, "b": B}[letter] for i, letter in enumerate(roles)}
    for name, role in role_of.items():
        bench.add(name, role, num_blocks=12)
    live: list = []
    for number in range(300):
        choice = rng.random()
        if choice < 0.35:
            try:
                bench.submit(f"r{number}", num_prompt_tokens=rng.randint(1, 60),
                             max_tokens=rng.randint(1, 6), seed=rng.choice([None, 1]))  # fmt: skip
            except ServingError:
                pass
        elif choice < 0.8 and live:
            bench.answer_one(rng, live)
        elif choice < 0.87 and live:
            worker, message = rng.choice(live)
            if bench.worker(worker) is not None:
                bench.fail(worker, message.handoff_id, rng.choice(["engine_failed", "invalid_request"]))
        elif choice < 0.93 and bench.sinks:
            bench.perform(bench.core.abort(rng.choice(list(bench.sinks)), bench.now_s))
        elif choice < 0.96:
            name = rng.choice(list(role_of))
            bench.perform(bench.core.worker_lost(name, "chaos", bench.now_s))
            bench.add(name, role_of[name], num_blocks=12)
        else:
            bench.now_s += rng.choice([0.1, 25.0])
            bench.perform(bench.core.tick(bench.now_s))
        live += bench.take(StartPrefill) + bench.take(StartDecode)
        for worker in bench.core.fleet:
            assert worker.account.num_queued_tokens >= 0
    bench.perform(bench.core.abort_all("end of the test", bench.now_s))
    assert all(len(sink.reports) == 1 for sink in bench.sinks.values())
    bench.assert_nothing_is_held()
