"""A pair of workers between which KV does not arrive: the others go on, together and with each of the two."""

from __future__ import annotations

from collections import Counter

import pytest

from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    WorkerLoad,
)
from baton.policy.pair_health import FENCE_S, MAX_FAILURES

P, D = WorkerRole.PREFILL, WorkerRole.DECODE
BROKEN = ("p0", "d0")


def fleet(make_bench, *names, policies=("round-robin", "round-robin"), **settings):
    bench = make_bench(policies, **settings)
    for name in names:
        bench.add(name, P if name[0] == "p" else D)
    return bench


def serve(bench, request_id, broken=BROKEN, has_engine_policy=False):
    """One request, start to end; the pair of its first attempt. Between the broken two no KV arrives: the leg
    fails, or its engine computes the prompt and says so."""
    sink = bench.submit(request_id, max_tokens=4)
    ((prefill, start),) = bench.take(StartPrefill)
    bench.finish_prefill(prefill, start.handoff_id)
    ((decode, order),) = bench.take(StartDecode)
    pair = (prefill, decode)
    is_lost = pair == broken
    if is_lost and not has_engine_policy:
        bench.fail(decode, order.handoff_id, "kv_transfer_failed")
        ((decode, order),) = bench.take(StartDecode)
    delta = SequenceDelta(
        order.handoff_id, [7, 8, 9], "abc", "length", has_lost_kv=is_lost and has_engine_policy
    )
    message = StepOutputs(deltas=[delta], load=WorkerLoad())
    bench.take(AbortLeg)
    bench.perform(bench.core.step(bench.worker(decode), message, bench.now_s))
    let_go = [(prefill, AbortLeg(handoff_id=start.handoff_id))]  # nobody will read what it holds
    assert bench.take(AbortLeg) == (let_go if delta.has_lost_kv else [])
    assert sink.reports[0].outcome is Outcome.COMPLETED
    return pair


@pytest.mark.parametrize("has_engine_policy", [False, True], ids=["leg fails", "engine recomputes"])
def test_pain_9_a_broken_pair_is_fenced_after_three_failures_and_all_others_go_on(
    make_bench, has_engine_policy
):
    bench = fleet(make_bench, "p0", "p1", "d0", "d1", policies=("random", "random"))
    pairs = Counter(serve(bench, f"r{n}", has_engine_policy=has_engine_policy) for n in range(100))
    assert pairs.pop(BROKEN) == MAX_FAILURES
    assert set(pairs) == {("p0", "d1"), ("p1", "d0"), ("p1", "d1")}
    assert min(pairs.values()) >= 10
    ((bad),) = bench.core.bad_pairs(bench.now_s)
    assert (bad.prefill_worker, bad.decode_worker, bad.num_failures) == (*BROKEN, MAX_FAILURES)
    assert bad.fenced_s == FENCE_S
    bench.assert_nothing_is_held()


def test_one_request_in_a_while_is_tried_until_the_pair_works_again(make_bench):
    bench = fleet(make_bench, "p0", "p1", "d0", "d1", policies=("random", "random"))
    for n in range(60):
        serve(bench, f"a{n}")
    for trial in range(3):
        bench.now_s += FENCE_S
        pairs = Counter(serve(bench, f"b{trial}-{n}") for n in range(60))
        assert pairs[BROKEN] == 1
    bench.now_s += FENCE_S
    pairs = Counter(serve(bench, f"c{n}", broken=None) for n in range(60))
    assert pairs[BROKEN] > 5
    assert list(bench.core.bad_pairs(bench.now_s)) == []


@pytest.mark.parametrize("worker_id", BROKEN)
def test_a_restart_of_either_worker_opens_the_pair(make_bench, worker_id):
    bench = fleet(make_bench, "p0", "p1", "d0", "d1", policies=("random", "random"))
    for n in range(60):
        serve(bench, f"a{n}")
    bench.add(worker_id, P if worker_id[0] == "p" else D, boot_id="new")
    assert list(bench.core.bad_pairs(bench.now_s)) == []
    assert Counter(serve(bench, f"b{n}", broken=None) for n in range(60))[BROKEN] > 5


def test_where_only_fenced_pairs_are_left_they_are_tried_all_the_same(make_bench):
    """1P1D: every hand-off fails and is recomputed; nobody waits and nobody is refused."""
    bench = fleet(make_bench, *BROKEN)
    for n in range(10):
        assert serve(bench, f"r{n}") == BROKEN


def test_a_decode_worker_that_gets_kv_from_nobody_is_passed_over(make_bench):
    bench = fleet(make_bench, "p0", "d0", "d1", policies=("random", "random"))
    pairs = Counter(serve(bench, f"r{n}") for n in range(60))
    assert pairs == {BROKEN: MAX_FAILURES, ("p0", "d1"): 60 - MAX_FAILURES}


def test_a_request_takes_the_next_decode_worker_when_its_prefill_workers_have_no_room(make_bench):
    """d0 is the better one, but of its prefill workers only the fenced one could begin now."""
    bench = make_bench()
    for name in ("p0", "p1"):
        bench.add(name, P, prefill_window_tokens=30)
    bench.add("d0", D)
    bench.add("d1", D)
    for _ in range(MAX_FAILURES):
        bench.core._dispatch.handoff_failed("p0", "d0", bench.now_s)
    bench.worker("p1").account.commit("other", num_queued_tokens=30, num_blocks=1)
    bench.worker("d1").account.commit("other", num_queued_tokens=0, num_blocks=1)
    bench.submit("r")
    request = bench.core._requests["r"]
    assert (request.prefill_worker, request.decode_worker) == ("p0", "d1")


def test_a_timeout_of_a_hand_off_counts_and_a_lost_worker_does_not(make_bench):
    bench = fleet(make_bench, *BROKEN)
    bench.prefilled("late")
    bench.perform(bench.core.tick(21.0))
    ((bad),) = bench.core.bad_pairs(bench.now_s)
    assert bad.num_failures == 1
    bench.prefilled("lost")
    bench.perform(bench.core.worker_lost("p0", "killed", 21.0))
    assert list(bench.core.bad_pairs(bench.now_s)) == []


def test_an_explanation_names_who_was_passed_over(make_bench):
    bench = fleet(make_bench, "p0", "p1", "d0", policies=("random", "random"), keeps_records=True)
    for _ in range(MAX_FAILURES):
        bench.core._dispatch.handoff_failed("p0", "d0", bench.now_s)
    bench.submit("r")
    (record,) = bench.core._requests["r"].records
    assert record["left_out"] == {"p0": "hand-offs between the two fail"}
