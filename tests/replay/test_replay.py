"""Whole replays: against a slow simulator, against arithmetic, and that nothing is left over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from baton.replay import FleetShape, ReplaySettings, Slo, parse_fleet, replay
from baton.replay.capacity import at_capacity_share, capacity_per_s
from baton.replay.simulation import _Replay
from baton.simulation import SimulatedWorkerSettings
from baton.step_time import KvLink, LinearStepTime, StepWork
from baton.workload import SessionWorkload, Trace, TraceRequest, WorkloadError
from baton.workload.trace import trace_of
from tests.simulation.naive_worker import NaiveLeg, NaiveWorker

PACE = LinearStepTime(base_s=0.004, per_prefill_token_s=2e-5, per_decode_s=2e-5, per_context_token_s=1e-8)


def settings(fleet: str = "2P2D", *, num_blocks: int = 4_000, block: int = 16, **more: Any) -> ReplaySettings:
    worker = SimulatedWorkerSettings(
        num_blocks=num_blocks, block_size_tokens=block, max_num_batched_tokens=2048
    )
    return ReplaySettings(
        fleet=parse_fleet(fleet), worker=worker, prefill_time=PACE, decode_time=PACE, **more
    )


def sessions(num_sessions: int = 30, rate_per_s: float = 4.0, seed: int = 1) -> Trace:
    return SessionWorkload(num_sessions=num_sessions, session_rate_per_s=rate_per_s).generate(seed=seed)


def request(arrival_s: float, num_prompt: int, num_output: int, hashes: list[int]) -> TraceRequest:
    return TraceRequest(0, arrival_s, num_prompt, num_output, np.array(hashes, np.int64), -1, 0, 0.0)


def test_one_request_takes_what_its_parts_take():
    """Prefill of 100 tokens, 32 bytes a token over a link, then four more tokens of decode."""
    link = KvLink(bytes_per_s=32_000.0, latency_s=0.01)
    result = replay(
        trace_of([request(1.0, 100, 5, [])], name="one"),
        settings("1P1D", link=link, kv_bytes_per_token=32),
    )
    prefill_s = 0.004 + 100 * 2e-5
    assert result.ttft_s[0] == pytest.approx(prefill_s)
    transfer_s = 0.01 + 101 * 32 / 32_000  # the first token travels in the prompt
    steps_s = sum(PACE.step_s(StepWork(0, 0.0, 1, 101 + n)) for n in range(4))
    assert result.finished_s[0] - 1.0 == pytest.approx(prefill_s + transfer_s + steps_s)


def test_who_gives_up_at_the_head_of_the_queue_lets_the_next_one_start():
    """
    1. the first request takes half of the decode worker for seconds
    2. the second needs more than is left, waits at the head, and gives up after 0.5 s
    3. the third, which fits, starts at that moment
    """
    trace = trace_of(
        [request(0.0, 800, 700, []), request(0.1, 900, 2, []), request(0.2, 100, 2, [])], name="three"
    )
    result = replay(trace, settings("1P1D", num_blocks=100, expected_output_tokens=1, queue_timeout_s=0.5))
    assert result.finished_s[0] > 2.0
    assert result.is_served.tolist() == [True, False, True]
    assert result.first_token_s[2] == pytest.approx(0.6 + 0.004 + 100 * 2e-5)


def test_progress_that_is_told_late_makes_room_when_it_is_heard():
    """A window of 7,200 tokens, steps of 2,048: a second prompt of 1,000 fits once the first step of the
    one of 8,192 is known, 10 ms after its end and before its second step has ended."""
    trace = trace_of([request(0.0, 8192, 2, []), request(0.01, 1000, 2, [])], name="two")
    config = settings("1P1D", prefill_window_tokens=7200, report_delay_s=0.01, expected_output_tokens=1)
    runner = _Replay(trace, config, None)
    runner.run()
    first_step_s = PACE.step_s(StepWork(2048, 0.0, 0, 0))
    assert runner._requests[1].dispatched_s == pytest.approx(first_step_s + 0.01)


def test_the_first_token_by_decode_is_one_step_later():
    trace = trace_of([request(0.0, 100, 5, [])], name="one")
    early = replay(trace, settings("1P1D"))
    late = replay(trace, settings("1P1D", first_token_by="decode"))
    assert late.ttft_s[0] - early.ttft_s[0] == pytest.approx(PACE.step_s(StepWork(0, 0.0, 1, 100)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_blocks", [600, 4_000])
def test_one_colocated_worker_is_the_naive_worker(seed: int, num_blocks: int):
    """Every finish of a trace with shared prefixes, whether or not there is room for all."""
    draw = np.random.default_rng(seed)
    requests = []
    for _ in range(40):
        num_prompt = int(draw.integers(20, 1500))
        parent, hashes = 0, []
        for _ in range(num_prompt // 16):
            parent = hash((parent, int(draw.random() < 0.05))) & 0xFFFF_FFFF
            hashes.append(parent)
        requests.append(request(float(draw.uniform(0, 1.5)), num_prompt, int(draw.integers(1, 200)), hashes))
    trace = trace_of(requests, name="random", block_size_tokens=16)
    # No room is kept for output, so that the worker itself runs out of blocks.
    result = replay(
        trace, settings("1both", num_blocks=num_blocks, expected_output_tokens=0, prefill_policy="random")
    )
    naive = NaiveWorker(num_blocks, 16, 256, 2048, PACE)
    waiting = list(enumerate(trace))
    while waiting or naive.running or naive.waiting:
        while waiting and waiting[0][1].arrival_s <= naive.now_s:
            index, r = waiting.pop(0)
            naive.add(NaiveLeg(index, r.block_hashes.tolist(), r.num_prompt_tokens, r.num_output_tokens))
        if not naive.step():
            naive.now_s = waiting[0][1].arrival_s
    if num_blocks == 4_000:  # otherwise the coordinator holds requests back, which a bare engine cannot
        ends = {index: end_s for index, _, end_s in naive.log}
        assert [ends[n] for n in range(40)] == pytest.approx(result.finished_s.tolist(), abs=1e-6)
        assert {index: cached for index, cached, _ in naive.log} == dict(
            enumerate(result.num_cached_tokens.tolist())
        )
    else:
        assert result.makespan_s >= 0.95 * naive.now_s


@pytest.mark.parametrize("fleet", ["1P1D", "3P2D", "4both", "1P1D2both"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"link": KvLink(bytes_per_s=1e9, latency_s=1e-3), "kv_bytes_per_token": 2048},
        {"prefill_window_tokens": 2048},
        {"prefill_scheduler": "shortest-prefill", "decode_scheduler": "skip-join-mlfq"},
        {"report_delay_s": 0.1, "has_guard": False},
        {"queue_timeout_s": 0.5},
    ],
    ids=["plain", "link", "window", "schedulers", "late reports", "time-out"],
)
def test_nothing_is_left_over(fleet: str, more: dict[str, Any]):
    """All blocks are back in every worker's queue, every account is zero, nobody is expected."""
    trace = sessions()
    run = _Replay(trace, settings(fleet, num_blocks=900, **more), None)
    result = run.run()
    for member in run._fleet.members:
        assert member.worker.cache.num_free_blocks == 900
        assert sum(block.num_blocks for block in member.worker.cache.runs_in_queue) == 900
        account = member.account
        assert (account.num_legs, account.num_queued_tokens, account.num_reserved_blocks) == (0, 0, 0)
        assert member.worker.num_legs == 0 and not member.worker.places.holds
    expectations = run._fleet.router._expectations
    assert expectations is not None and len(expectations) == 0
    served = result.is_served
    assert (result.finished_s[served] >= result.first_token_s[served]).all()
    assert (result.first_token_s[served] > result.arrival_s[served]).all()
    assert result.num_rejected == 0 or more.get("queue_timeout_s")


def test_the_same_again_is_the_same_to_the_last_bit():
    trace = sessions()
    first, again, other = (
        replay(trace, settings("3P2D", prefill_policy="random", seed=seed)) for seed in (1, 1, 2)
    )
    assert (first.finished_s == again.finished_s).all()
    assert (first.prefill_worker == again.prefill_worker).all()
    assert (first.prefill_worker != other.prefill_worker).any()


def test_predicted_hits_are_the_hits_when_nothing_happens_in_between():
    """A3: one request after the other, events at once."""
    trace = sessions(num_sessions=30)
    spaced = replace(trace, arrival_s=np.arange(len(trace), dtype=np.float64) * 1000)
    block = trace.block_size_tokens
    result = replay(spaced, settings("3P2D", num_blocks=12_800 // block, block=block))
    assert result.hit_ratio > 0.1
    assert (result.num_predicted_tokens == result.num_cached_tokens).all()
    # Where a hash names several blocks, the engine may still hold some of one: never fewer than expected.
    result = replay(spaced, settings("3P2D", num_blocks=12_800 // 16, block=16))
    assert (result.num_predicted_tokens <= result.num_cached_tokens).all()
    assert (result.num_cached_tokens - result.num_predicted_tokens < block).all()


def test_late_reports_are_worse_predictions():
    trace = sessions(rate_per_s=8.0)
    exact = replay(trace, settings("3P2D"))
    late = replay(trace, settings("3P2D", report_delay_s=5.0))

    def error(result: Any) -> int:
        return int(np.abs(result.num_predicted_tokens - result.num_cached_tokens).sum())

    assert error(late) > error(exact)


def test_closed_loop_waits_for_the_answer():
    trace = sessions(num_sessions=10)
    result = replay(trace, settings("1P1D", is_closed_loop=True))
    previous = trace.previous_turn
    follows = previous >= 0
    assert follows.any()
    expected = result.finished_s[previous[follows]] + trace.think_s[follows]
    assert result.arrival_s[follows] == pytest.approx(expected)


def test_who_waits_too_long_is_refused_and_is_no_goodput():
    burst = trace_of([request(0.0, 2000, 50, []) for _ in range(60)], name="burst")
    result = replay(burst, settings("1P1D", num_blocks=400, queue_timeout_s=0.2))
    assert 0 < result.num_rejected < 60
    slo = Slo(ttft_s=1e6, tpot_s=1e6)
    assert result.goodput(slo) == pytest.approx(1 - result.num_rejected / 60)
    assert len(result.ttft_s) == 60 - result.num_rejected


def test_a_window_keeps_prompts_where_they_can_still_go_elsewhere():
    burst = trace_of([request(0.0, 2000, 1, []) for _ in range(9)], name="burst")
    run = _Replay(burst, settings("3P1D", prefill_window_tokens=2000), None)
    run.run()
    dispatched = sorted(r.dispatched_s for r in run._requests)
    assert dispatched[:3] == [0.0, 0.0, 0.0] and dispatched[3] > 0


def test_cache_and_load_awareness_beat_round_robin():
    trace = sessions(num_sessions=150, rate_per_s=6.0)
    blind, aware = (
        replay(trace, settings("4P4D", prefill_policy=name)) for name in ("round-robin", "lmetric")
    )
    assert aware.hit_ratio > 1.2 * blind.hit_ratio
    assert aware.ttft_s.mean() < blind.ttft_s.mean()


def test_load_is_a_share_of_what_the_fleet_can_take():
    trace = sessions(num_sessions=100)
    s = settings("1P1D")
    capacity = capacity_per_s(trace, s)
    relaxed = replay(at_capacity_share(trace, 0.3, capacity), s)
    crowded = replay(at_capacity_share(trace, 1.5, capacity), s)
    assert relaxed.arrival_s[-1] == pytest.approx((len(trace) - 1) / (0.3 * capacity), rel=0.2)
    assert crowded.ttft_s.mean() > 3 * relaxed.ttft_s.mean()
    assert crowded.throughput_per_s == pytest.approx(capacity, rel=0.25)


def test_what_fits_nobody_is_said_before_anything_runs():
    trace = trace_of([request(0.0, 5000, 10, [])], name="long")
    with pytest.raises(WorkloadError, match="has 5010 tokens, a worker holds 100 blocks of 16"):
        replay(trace, settings(num_blocks=100))
    odd = trace_of([request(0.0, 50, 10, [1])], name="odd", block_size_tokens=24)
    with pytest.raises(WorkloadError, match="hashes 24 tokens at a time"):
        replay(odd, settings())


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("8P8D", FleetShape(8, 8)),
        ("1p2d", FleetShape(1, 2)),
        ("16both", FleetShape(0, 0, 16)),
        ("4P3D2both", FleetShape(4, 3, 2)),
    ],
)
def test_fleets(text: str, shape: FleetShape):
    assert parse_fleet(text) == shape
    assert str(shape).lower() == text.lower()


@pytest.mark.parametrize("text", ["", "8P", "0P1D", "both", "0both", "1P1D0both", "8P8D4E"])
def test_no_fleets(text: str):
    with pytest.raises(ValueError, match="8P8D, 16both or 4P4D2both"):
        parse_fleet(text)
