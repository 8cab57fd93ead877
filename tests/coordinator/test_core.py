"""The life of a request as facts in, actions out."""

from __future__ import annotations

import pytest

from baton.contract.lifecycle import IllegalMove, Outcome, RequestState, WorkerRole, check_move
from baton.contract.messages import (
    Heartbeat,
    KvSource,
    PrefillFinished,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    WorkerLoad,
)
from baton.contract.tokens import unpack_token_ids

P, D = WorkerRole.PREFILL, WorkerRole.DECODE


def test_a_request_goes_from_prefill_to_decode_and_ends_once(bench):
    """
    1. submitted: prefill starts at once, room on the decode worker is reserved
    2. prefill ends: its token reaches the client, decode continues after it
    3. decode ends: the client hears "completed", nothing is held
    """
    sink = bench.submit("r", max_tokens=3, min_tokens=2)
    ((worker, prefill),) = bench.take(StartPrefill)
    assert worker == "p0" and prefill.keep_kv
    assert bench.worker("d0").account.num_reserved_blocks == 2  # ceil((20 + 3) / 16)

    bench.now_s = 1.0
    bench.finish_prefill("p0", prefill.handoff_id, token_id=7)
    ((worker, decode),) = bench.take(StartDecode)
    assert sink.token_ids == [7]
    assert worker == "d0" and unpack_token_ids(decode.prompt_token_ids) == [*range(20), 7]
    assert (decode.sampling.max_tokens, decode.sampling.min_tokens) == (2, 1)  # one is given already
    assert decode.kv_source.lease_s == pytest.approx(
        29.01
    )  # 30, less the 0.99 s of 1 that nobody accounts for

    bench.now_s = 1.5
    bench.step("d0", decode.handoff_id, 8)
    bench.now_s = 2.0
    bench.step("d0", decode.handoff_id, 9, finish="length")
    (report,) = sink.reports
    assert sink.token_ids == [7, 8, 9]
    assert (report.outcome, report.finish_reason, report.num_output_tokens) == (
        Outcome.COMPLETED,
        "length",
        3,
    )
    assert report.kv_bytes == 2048
    assert report.num_cached_tokens == 4
    times = report.phases
    assert (times.queue_s, times.prefill_s, times.handoff_s, times.decode_s) == (0.0, 1.0, 0.5, 0.5)
    bench.assert_nothing_is_held()


def test_one_token_needs_no_decode_worker(bench):
    sink = bench.submit("r", max_tokens=1)
    ((_, prefill),) = bench.take(StartPrefill)
    assert not prefill.keep_kv
    bench.finish_prefill("p0", prefill.handoff_id, finish="length")
    assert sink.reports[0].outcome is Outcome.COMPLETED
    assert bench.take(StartDecode) == []
    bench.assert_nothing_is_held()


def test_a_first_token_that_ends_the_sequence_ends_the_request(bench):
    sink = bench.submit("r", max_tokens=50)
    ((_, prefill),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", prefill.handoff_id, finish="stop")
    assert sink.reports[0].finish_reason == "stop"
    assert bench.take(StartDecode) == []
    bench.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"seed": 1}, "seeded sampling"),
        ({"presence_penalty": 0.5}, "penalties"),
        ({"frequency_penalty": -0.5}, "penalties"),
        ({"stop": ["END"]}, "stop strings"),
        ({"bad_words": ["no"]}, "bad words"),
    ],
    ids=lambda value: str(value),
)
def test_the_decode_worker_gives_the_first_token_where_it_would_differ(bench, sampling, reason):
    sink, handoff_id = bench.prefilled("r", max_tokens=4, **sampling)
    ((_, decode),) = bench.take(StartDecode)
    assert sink.token_ids == []
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20)]
    assert decode.sampling.max_tokens == 4
    bench.step("d0", handoff_id, 5)
    assert sink.placements[0].first_token_by is WorkerRole.DECODE
    assert sink.placements[0].first_token_reason == reason


def test_seed_without_randomness_keeps_the_prefill_token(bench):
    sink, _ = bench.prefilled("r", seed=1, temperature=0.0)
    assert sink.token_ids == [100]
    assert sink.placements[0].first_token_by is WorkerRole.PREFILL


def test_a_first_token_without_text_is_left_to_the_decode_worker(bench):
    """Half a character cannot be shown; the decode worker samples it again with its successor."""
    sink = bench.submit("r")
    ((_, prefill),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", prefill.handoff_id, text="")
    ((_, decode),) = bench.take(StartDecode)
    assert sink.token_ids == []
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20)]


def test_a_token_nobody_will_see_cannot_end_the_prefill(bench):
    bench.submit("r", seed=3, stop=["x"], prompt_logprobs=2)
    ((_, prefill),) = bench.take(StartPrefill)
    assert (prefill.sampling.temperature, prefill.sampling.ignore_eos, prefill.sampling.stop) == (
        0.0,
        True,
        [],
    )
    assert prefill.sampling.prompt_logprobs == 2


def test_prefill_waits_until_a_decode_worker_has_room(make_bench):
    """
    1. two requests fill the decode worker's 4 blocks: the third stays queued
    2. one ends: the third is dispatched
    """
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D, num_blocks=4, max_model_len=64)
    first, _ = bench.submit("a", max_tokens=8), bench.submit("b", max_tokens=8)
    third = bench.submit("c", max_tokens=8)
    starts = bench.take(StartPrefill)
    assert [m.request_id for _, m in starts] == ["a", "b"]  # 2 blocks each: ceil((20 + 8) / 16)
    assert bench.core.num_queued == 1

    bench.finish_prefill("p0", starts[0][1].handoff_id)
    bench.step("d0", starts[0][1].handoff_id, 1, finish="stop")
    assert first.reports and not third.reports
    assert [m.request_id for _, m in bench.take(StartPrefill)] == ["c"]


def test_nobody_overtakes_the_head_of_the_queue(make_bench):
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D, num_blocks=4, max_model_len=64)
    bench.submit("a")
    bench.submit("large", num_prompt_tokens=50)
    bench.submit("small", num_prompt_tokens=2)
    assert [m.request_id for _, m in bench.take(StartPrefill)] == ["a"]


def test_prefill_goes_to_the_worker_with_fewest_tokens_to_compute(bench):
    bench.add("p1", P)
    bench.submit("long", num_prompt_tokens=200)
    bench.submit("short", num_prompt_tokens=10)
    bench.submit("next", num_prompt_tokens=10)
    long, short, following = (w for w, _ in bench.take(StartPrefill))
    assert {long, short} == {"p0", "p1"}  # nobody had work yet: which one is drawn
    assert following == short


def test_decode_goes_to_the_smallest_batch(bench):
    bench.add("d1", D)
    workers = set()
    for name in "ab":
        _, _ = bench.prefilled(name)
        workers |= {w for w, _ in bench.take(StartDecode)}
    assert workers == {"d0", "d1"}


def test_illegal_moves_raise():
    with pytest.raises(IllegalMove):
        check_move(RequestState.FINISHED, RequestState.DECODING)


def test_prompts_beyond_the_workers_window_wait_here(make_bench):
    """
    1. a window of 50 tokens: two prompts of 20 go, the third would be ahead of its time
    2. one is computed: the third goes, although decode of the first has not begun
    """
    bench = make_bench()
    bench.add("p0", P, prefill_window_tokens=50)
    bench.add("d0", D)
    for name in "abc":
        bench.submit(name, num_prompt_tokens=20)
    starts = bench.take(StartPrefill)
    assert [m.request_id for _, m in starts] == ["a", "b"]
    bench.finish_prefill("p0", starts[0][1].handoff_id)
    assert [m.request_id for _, m in bench.take(StartPrefill)] == ["c"]


def test_a_prompt_longer_than_the_window_goes_alone(make_bench):
    bench = make_bench()
    bench.add("p0", P, prefill_window_tokens=50)
    bench.add("d0", D)
    bench.submit("long", num_prompt_tokens=200)
    bench.submit("short", num_prompt_tokens=5)
    assert [m.request_id for _, m in bench.take(StartPrefill)] == ["long"]


def test_time_in_queues_comes_off_the_lease(bench):
    """
    1. a prefill of 2 s is over for its engine at 2.1 s; its news is read at 9 s: 6.9 s may be gone
    2. the decode worker's clock, heard with its heartbeat, is 90 s ahead: it learns the time of sending
    """
    bench.submit("r")
    ((_, start),) = bench.take(StartPrefill)
    bench.now_s = 8.5
    heartbeat = Heartbeat(load=WorkerLoad(), num_legs=0, sent_s=98.5)
    bench.core.heartbeat(bench.worker("d0"), heartbeat, bench.now_s)
    bench.now_s = 9.0
    finished = PrefillFinished(
        delta=SequenceDelta(start.handoff_id, [7], "x"),
        kv_source=KvSource(lease_s=30.0, num_tokens=20, num_bytes=2048, transfer_params={}),
        queue_s=0.1, prefill_s=2.0, load=WorkerLoad(),
    )  # fmt: skip
    bench.perform(bench.core.prefill_finished(bench.worker("p0"), finished, bench.now_s))
    ((_, decode),) = bench.take(StartDecode)
    assert decode.kv_source.lease_s == pytest.approx(23.1)  # 30 - (9 - 0 - 0.1 - 2)
    assert decode.sent_s == pytest.approx(99.0)  # 98.5 when it said so, 0.5 s ago


def test_a_lease_that_ended_in_a_queue_is_zero_and_not_negative(bench):
    bench.submit("r")
    ((_, start),) = bench.take(StartPrefill)
    bench.now_s = 100.0
    bench.finish_prefill("p0", start.handoff_id)
    ((_, decode),) = bench.take(StartDecode)
    assert decode.kv_source.lease_s == 0.0
