"""Who is let in, who is sent away for how long, and whose deadline is out of reach."""

from __future__ import annotations

import math
import random

import pytest

from baton.contract.errors import DeadlineUnreachable, QueueFull
from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import BlocksStored, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec, ServiceWish
from baton.contract.tokens import pack_token_ids
from baton.policy.stay_or_go import Pace
from baton.step_time.linear import LinearStepTime
from coordinator.deadline import least_output_tokens
from coordinator.drain_rate import DrainRate
from coordinator.waiting_line import MAX_RETRY_AFTER_S, UNMEASURED_RETRY_AFTER_S

P, D = WorkerRole.PREFILL, WorkerRole.DECODE

PACE = Pace(
    prefill=LinearStepTime(base_s=0.0, per_prefill_token_s=0.01),
    decode=LinearStepTime(base_s=0.1, per_decode_s=0.0),
    handoff_s=0.1,
    handoff_per_byte_s=0.0,
)
"""20 prompt tokens take 0.2 s, each decode step 0.1 s."""


def one_at_a_time(make_bench, **settings):
    """1P1D; the decode worker serves one request, so each that ends lets the next one go."""
    bench = make_bench(**settings)
    bench.add("p0", P)
    bench.add("d0", D, max_batch_size=1)
    return bench


def serve_one(bench):
    """The request that was dispatched last ends; the next in line is dispatched."""
    ((_, start),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", start.handoff_id, finish="stop")


# ── the rate ──────────────────────────────────────────────────────────────────────────────────


def test_the_rate_is_measured_while_somebody_waits_and_idle_hours_do_not_count():
    """
    1. nothing measured: None
    2. a line moves by one each half second
    3. an idle hour later the next line is still expected to move as fast
    """
    rate = DrainRate()
    assert rate.seconds_for(10, 0.0) is None
    rate.waits(True, 0.0)
    for number in range(1, 9):
        rate.departed(number * 0.5)
    assert rate.seconds_for(10, 4.0) == pytest.approx(5.0)  # 10 x 0.5
    rate.waits(False, 4.0)
    rate.departed(1000.0)  # nobody stood in line: no measurement
    rate.waits(True, 3600.0)
    assert rate.seconds_for(10, 3600.0) == pytest.approx(5.0)


def test_a_line_that_got_stuck_looks_slow_before_anybody_leaves_again():
    rate = DrainRate()
    rate.waits(True, 0.0)
    for number in range(1, 5):
        rate.departed(float(number))
    assert rate.seconds_for(1, 4.5) == pytest.approx(1.0)
    assert rate.seconds_for(1, 10.0) == pytest.approx(2.0)  # (4 + 6) s / 5


def test_a_faster_fleet_is_noticed_within_the_memory():
    rate = DrainRate()
    rate.waits(True, 0.0)
    now_s = 0.0
    for gap_s, count in ((1.0, 100), (0.1, 150)):
        for _ in range(count):
            now_s += gap_s
            rate.departed(now_s)
    assert rate.seconds_for(100, now_s) == pytest.approx(10.0)


# ── 429 ───────────────────────────────────────────────────────────────────────────────────────


def test_retry_after_is_the_line_over_the_measured_rate_and_a_client_that_obeys_gets_in(make_bench):
    """
    1. a full line of 8 whose rate is not known: the stated default
    2. one leaves each 0.5 s; refused at a full line: told 8 / (2 per s) = 4 s
    3. it comes back then, and is let in, since everybody else stopped asking
    """
    bench = one_at_a_time(make_bench, max_queued=8)
    for number in range(9):
        bench.submit(f"r{number}")
    with pytest.raises(QueueFull) as refusal:
        bench.submit("late")
    assert refusal.value.retry_after_s == UNMEASURED_RETRY_AFTER_S
    for number in range(6):
        bench.now_s += 0.5
        serve_one(bench)
        bench.submit(f"more{number}")
    with pytest.raises(QueueFull) as refusal:
        bench.submit("late")
    assert refusal.value.retry_after_s == pytest.approx(4.0)
    back_s = bench.now_s + refusal.value.retry_after_s
    while bench.now_s < back_s:
        bench.now_s += 0.5
        serve_one(bench)
    bench.submit("late")
    assert bench.core.num_queued == 1  # those 8 have left, the last of them to the worker


@pytest.mark.parametrize("seed", range(5))
def test_under_constant_overload_an_obedient_client_is_refused_a_few_times_only(make_bench, seed):
    """Twice the load the fleet serves, from clients of which all come back when they were told to: nobody
    is sent away for more than the cap, and the line never exceeds its bound."""
    rng = random.Random(seed)
    bench = one_at_a_time(make_bench, max_queued=10)
    returning = [(rng.uniform(0.0, 10.0), f"r{number}", 0) for number in range(100)]
    served_each_s, next_s = 0.2, 0.2
    refused_by_request: dict[str, int] = {}
    told_s: list[float] = []
    while returning:
        returning.sort()
        at_s, name, num_refused = returning.pop(0)
        while next_s <= at_s:
            bench.now_s = next_s
            if bench.core.num_requests:
                serve_one(bench)
            next_s += served_each_s
        bench.now_s = at_s
        try:
            bench.submit(name)
            refused_by_request[name] = num_refused
        except QueueFull as refusal:
            told_s.append(refusal.retry_after_s or 0.0)
            # Whole seconds, as the header has them.
            returning.append((at_s + math.ceil(told_s[-1]), name, num_refused + 1))
    assert 1.0 <= min(told_s) <= max(told_s) <= MAX_RETRY_AFTER_S
    assert len(refused_by_request) == 100
    assert max(refused_by_request.values()) <= 8


def test_who_leaves_while_waiting_makes_room_for_who_is_there(make_bench):
    """The head waits for room; two behind it are aborted: their places are free at once."""
    bench = one_at_a_time(make_bench, max_queued=3)
    for name in "abcd":
        bench.submit(name)
    with pytest.raises(QueueFull):
        bench.submit("e")
    for name in "cd":
        bench.perform(bench.core.abort(name, bench.now_s))
    assert bench.core.num_queued == 1
    bench.submit("e")
    serve_one(bench)
    serve_one(bench)
    ((_, start),) = bench.take(StartPrefill)
    assert start.request_id == "e"


# ── deadlines ─────────────────────────────────────────────────────────────────────────────────


def within(deadline_s, **wish):
    return {"service": ServiceWish(deadline_s=deadline_s, **wish)}


def test_nothing_measured_nothing_refused(make_bench):
    bench = one_at_a_time(make_bench)
    for number in range(20):
        bench.submit(f"r{number}", **within(0.001))
    assert bench.core.num_requests == 20


def test_a_deadline_beyond_the_line_is_refused_before_prefill_with_numbers(make_bench):
    """
    1. five in line, one leaves each second
    2. 3 s: refused, with the time after which it would do; 6 s: let in
    """
    bench = one_at_a_time(make_bench)
    for number in range(8):
        bench.submit(f"r{number}")
    for _ in range(2):
        bench.now_s += 1.0
        serve_one(bench)
    assert bench.core.num_queued == 5
    with pytest.raises(
        DeadlineUnreachable, match=r"at least 5 s \(5 s in line, 0 s of work\) and has 3 s"
    ) as no:
        bench.submit("late", **within(3.0))
    assert no.value.retry_after_s == pytest.approx(2.0)
    bench.submit("fine", **within(6.0))


def test_a_deadline_below_the_work_itself_is_refused_without_an_invitation_to_come_back(make_bench):
    """20 tokens of prompt 0.2 s, hand-off 0.1 s, 6 more steps of 0.1 s."""
    bench = make_bench(pace=PACE)
    bench.add("p0", P)
    bench.add("d0", D)
    answer = {"max_tokens": 8, "ignore_eos": True}
    with pytest.raises(DeadlineUnreachable, match=r"0 s in line, 0\.9 s of work") as refusal:
        bench.submit("late", **answer, **within(0.8))
    assert refusal.value.retry_after_s is None
    bench.submit("fine", **answer, **within(1.0))
    assert bench.take(StartPrefill)


def test_a_prefix_that_somebody_holds_is_not_counted_as_work(make_bench):
    bench = make_bench(pace=PACE)
    bench.add("p0", P, has_kv_events=True)
    bench.add("d0", D)
    with pytest.raises(DeadlineUnreachable):
        bench.submit("cold", 320, max_tokens=1, **within(1.0))  # 3.2 s
    blocks = BlocksStored(
        block_hashes=list(range(1, 20)), parent_hash=None, token_ids=pack_token_ids(range(304))
    )
    bench.kv_events("p0", 0, blocks)
    bench.submit("warm", 320, max_tokens=1, **within(1.0))  # 16 tokens


def test_a_deadline_that_passes_in_line_ends_the_request_there(make_bench):
    bench = one_at_a_time(make_bench)
    bench.submit("running")
    sink = bench.submit("waiting", **within(2.0))
    bench.now_s = 1.9
    bench.perform(bench.core.tick(1.9))
    assert not sink.reports
    bench.now_s = 2.1
    bench.perform(bench.core.tick(2.1))
    (report,) = sink.reports
    assert (report.outcome, report.error.code, report.error.phase) == (
        Outcome.EXPIRED,
        "deadline_exceeded",
        "queued",
    )
    assert bench.core.num_queued == 0


def test_at_the_head_of_the_line_it_is_asked_again_before_prefill_is_paid(make_bench):
    """Let in because nothing was known of the line; when its turn comes 0.5 s are left of 0.9 s of work."""
    bench = one_at_a_time(make_bench, pace=PACE)
    bench.submit("running")
    sink = bench.submit("waiting", max_tokens=8, ignore_eos=True, **within(2.0))
    behind = bench.submit("behind")
    bench.now_s = 1.5
    serve_one(bench)
    ((_, start),) = bench.take(StartPrefill)
    assert start.request_id == "behind" and not behind.reports
    assert sink.reports[0].error.code == "deadline_exceeded"
    assert "1.5 s waited and the work would take 0.9 s" in sink.reports[0].error.message


def test_what_runs_already_is_not_ended_by_its_deadline_and_workers_hear_what_is_left(bench):
    sink, handoff_id = bench.prefilled("r", **within(5.0))
    ((_, start),) = bench.take(StartDecode)
    assert start.sampling.service.deadline_s == pytest.approx(5.0)
    bench.step("d0", handoff_id, 1)
    bench.now_s = 6.0
    bench.perform(bench.core.tick(6.0))
    assert not sink.reports
    bench.now_s = 7.0
    bench.submit("s", **within(5.0))
    bench.now_s = 9.0
    ((_, start),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", start.handoff_id)
    ((_, start),) = bench.take(StartDecode)
    assert start.sampling.service.deadline_s == pytest.approx(3.0)  # 5, 2 have passed


@pytest.mark.parametrize(
    ("sampling", "least"),
    [
        ({}, 1),
        ({"min_tokens": 4}, 4),
        ({"ignore_eos": True}, 100),
        ({"service": ServiceWish(expected_output_tokens=30)}, 30),
        ({"service": ServiceWish(expected_output_tokens=300)}, 100),
    ],
    ids=["may end at once", "min_tokens", "ignore_eos", "a guess", "a guess beyond max_tokens"],
)
def test_the_least_an_answer_has(sampling, least):
    assert least_output_tokens(SamplingSpec(max_tokens=100, **sampling)) == least
