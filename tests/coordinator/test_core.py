"""The life of a request as facts in, actions out."""

from __future__ import annotations

import pytest

from baton.contract.errors import (
    Draining,
    DuplicateRequest,
    InvalidRequest,
    NoWorkers,
    PromptTooLong,
    QueueFull,
)
from baton.contract.lifecycle import IllegalMove, Outcome, RequestState, WorkerRole, check_move
from baton.contract.messages import (
    AbortLeg,
    Heartbeat,
    KvSource,
    NoMoreLegs,
    PrefillFinished,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    WorkerLoad,
)
from baton.contract.tokens import unpack_token_ids
from coordinator.waiting_line import UNMEASURED_RETRY_AFTER_S

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


# ── aborts ────────────────────────────────────────────────────────────────────────────────────


def test_abort_while_queued(make_bench):
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D, max_batch_size=1)
    bench.submit("a")
    sink = bench.submit("b")
    bench.perform(bench.core.abort("b", 0.0))
    assert sink.reports[0].outcome is Outcome.ABORTED
    assert bench.take(AbortLeg) == []


def test_abort_during_prefill_reaches_the_prefill_worker_only(bench):
    sink = bench.submit("r")
    ((_, prefill),) = bench.take(StartPrefill)
    bench.perform(bench.core.abort("r", 0.0))
    assert [(w, m.handoff_id) for w, m in bench.take(AbortLeg)] == [("p0", prefill.handoff_id)]
    assert sink.reports[0].error.code == "aborted"
    bench.assert_nothing_is_held()


def test_prefill_that_ends_after_its_abort_is_told_to_let_go(bench):
    """The abort and the result crossed: the worker holds KV for nobody until it hears."""
    sink = bench.submit("r")
    ((_, prefill),) = bench.take(StartPrefill)
    bench.perform(bench.core.abort("r", 0.0))
    bench.take(AbortLeg)
    bench.finish_prefill("p0", prefill.handoff_id)
    assert [(w, m.handoff_id) for w, m in bench.take(AbortLeg)] == [("p0", prefill.handoff_id)]
    assert sink.token_ids == [] and len(sink.reports) == 1


def test_abort_during_handoff_reaches_both(bench):
    sink, handoff_id = bench.prefilled("r")
    bench.perform(bench.core.abort("r", 0.0))
    assert sorted(w for w, _ in bench.take(AbortLeg)) == ["d0", "p0"]
    assert len(sink.reports) == 1
    bench.step("d0", handoff_id, 1)  # late: dropped
    assert sink.token_ids == [100]
    bench.assert_nothing_is_held()


def test_abort_during_decode_reaches_the_decode_worker(bench):
    _, handoff_id = bench.prefilled("r")
    bench.step("d0", handoff_id, 1)
    bench.perform(bench.core.abort("r", 0.0))
    assert [w for w, _ in bench.take(AbortLeg)] == ["d0"]
    bench.assert_nothing_is_held()


def test_abort_of_an_unknown_request_does_nothing(bench):
    assert bench.core.abort("nobody", 0.0) == []


# ── failures ──────────────────────────────────────────────────────────────────────────────────


def test_lost_prefill_worker_sends_the_request_elsewhere(bench):
    bench.add("p1", P)
    sink = bench.submit("r")
    ((worker, first),) = bench.take(StartPrefill)
    bench.perform(bench.core.worker_lost(worker, "killed", 0.0))
    ((other, second),) = bench.take(StartPrefill)
    assert {worker, other} == {"p0", "p1"} and first.handoff_id != second.handoff_id
    assert not sink.reports


def test_a_failed_transfer_is_recomputed_on_the_decode_worker(bench):
    """The client has the first token already: decode continues after it, from a computed prompt."""
    sink, first = bench.prefilled("r")
    bench.take(StartDecode)
    bench.fail("d0", first)
    ((worker, again),) = bench.take(StartDecode)
    assert worker == "d0" and again.kv_source is None and again.handoff_id != first
    assert unpack_token_ids(again.prompt_token_ids) == [*range(20), 100]
    bench.step("d0", first, 55)  # the old attempt's token: dropped
    bench.step("d0", again.handoff_id, 8, finish="stop")
    assert sink.token_ids == [100, 8]
    assert sink.reports[0].placement.num_attempts == 2
    assert sink.reports[0].kv_bytes == 0
    bench.assert_nothing_is_held()


def test_with_policy_fail_a_failed_transfer_is_an_error_naming_worker_and_phase(make_bench):
    bench = make_bench(transfer_failure_policy="fail")
    bench.add("p0", P)
    bench.add("d0", D)
    sink, handoff_id = bench.prefilled("r")
    bench.fail("d0", handoff_id)
    error = sink.reports[0].error
    assert (error.code, error.phase, error.worker_id) == ("kv_transfer_failed", "handing_off", "d0")
    bench.assert_nothing_is_held()


def test_attempts_are_bounded(bench):
    sink = bench.submit("r")
    for _ in range(3):
        ((worker, start),) = bench.take(StartPrefill)
        bench.fail(worker, start.handoff_id, code="engine_failed")
    assert bench.take(StartPrefill) == []
    assert sink.reports[0].outcome is Outcome.FAILED
    bench.assert_nothing_is_held()


def test_a_request_the_engine_refuses_is_not_tried_again(bench):
    sink = bench.submit("r")
    ((worker, start),) = bench.take(StartPrefill)
    bench.fail(worker, start.handoff_id, code="invalid_request")
    assert sink.reports[0].error.code == "invalid_request"


def test_with_policy_fail_a_lost_decode_worker_ends_the_stream_with_its_name(make_bench):
    bench = make_bench(decode_loss_policy="fail")
    bench.add("p0", P)
    bench.add("d0", D)
    bench.add("d1", D, max_batch_size=1, num_blocks=1)
    sink, handoff_id = bench.prefilled("r")
    bench.step("d0", handoff_id, 1)
    bench.perform(bench.core.worker_lost("d0", "killed", 0.0))
    assert (sink.reports[0].error.code, sink.reports[0].error.worker_id) == ("worker_lost", "d0")
    bench.assert_nothing_is_held()


def test_every_phase_has_a_deadline_measured_from_its_last_progress(make_bench):
    bench = make_bench(decode_stall_timeout_s=5.0, max_attempts=1, handoff_timeout_s=2.0)
    bench.add("p0", P)
    bench.add("d0", D)
    sink, handoff_id = bench.prefilled("decoding")
    bench.step("d0", handoff_id, 1)
    stuck, _ = bench.prefilled("stuck")
    bench.now_s = 4.0
    bench.step("d0", handoff_id, 2)
    bench.perform(bench.core.tick(4.0))
    assert stuck.reports[0].error.code == "phase_timeout"
    assert "handing_off for 2 s on worker d0" in stuck.reports[0].error.message
    bench.perform(bench.core.tick(8.9))  # 4.9 s since the last token
    assert not sink.reports
    bench.perform(bench.core.tick(9.1))
    assert sink.reports[0].outcome is Outcome.EXPIRED
    bench.assert_nothing_is_held()


def test_a_stalled_handoff_is_recomputed_before_it_is_given_up(bench):
    sink, _ = bench.prefilled("r")
    bench.take(StartDecode)
    bench.perform(bench.core.tick(21.0))
    ((_, again),) = bench.take(StartDecode)
    assert again.kv_source is None and not sink.reports


def test_duplicated_and_late_prefill_results_change_nothing(bench):
    sink, handoff_id = bench.prefilled("r")
    bench.finish_prefill("p0", handoff_id, token_id=9)
    assert sink.token_ids == [100]
    assert len(bench.take(StartDecode)) == 1


# ── refusals ──────────────────────────────────────────────────────────────────────────────────


def test_refusals_name_both_numbers(bench):
    with pytest.raises(PromptTooLong, match="prompt has 600 tokens, this fleet accepts 511"):
        bench.submit("r", num_prompt_tokens=600)
    with pytest.raises(InvalidRequest, match=r"max_tokens is 500; with a prompt of 20 tokens .* 1 to 492"):
        bench.submit("r", max_tokens=500)
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        bench.submit("r", max_tokens=0)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        bench.submit("r", num_prompt_tokens=0)
    bench.assert_nothing_is_held()


def test_a_prompt_larger_than_any_cache_is_refused_before_prefill(make_bench):
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D, num_blocks=2)
    with pytest.raises(PromptTooLong, match="largest decode worker holds 32"):
        bench.submit("r", num_prompt_tokens=40)


def test_same_id_twice_is_refused_while_in_flight(bench):
    bench.submit("r")
    with pytest.raises(DuplicateRequest):
        bench.submit("r")


def test_half_a_pair_is_not_ready(make_bench):
    bench = make_bench()
    with pytest.raises(NoWorkers, match="no prefill and no decode worker"):
        bench.submit("r")
    bench.add("p0", P)
    assert not bench.core.facts().is_ready
    with pytest.raises(NoWorkers, match="no decode worker"):
        bench.submit("r")
    bench.add("d0", D)
    assert bench.core.facts().is_ready


def test_a_full_queue_says_when_to_come_back(make_bench):
    bench = make_bench(max_queued=1)
    bench.add("p0", P)
    bench.add("d0", D, max_batch_size=1)
    bench.submit("a")
    bench.submit("b")
    with pytest.raises(QueueFull, match="1 requests are queued, the limit is 1") as refusal:
        bench.submit("c")
    assert refusal.value.retry_after_s == UNMEASURED_RETRY_AFTER_S


def test_draining_refuses_and_leaving_workers_get_nothing_new(bench):
    bench.add("p1", P)
    bench.core.worker_leaving(bench.worker("p0"))
    for name in "abc":
        bench.submit(name)
    assert {w for w, _ in bench.take(StartPrefill)} == {"p1"}
    bench.core.is_draining = True
    with pytest.raises(Draining):
        bench.submit("z")


def test_a_leaving_worker_serves_what_was_planned_with_it_and_is_then_dismissed(make_bench):
    """
    1. a prompt is being computed, its decode worker leaves: it is not dismissed, a request was planned there
    2. the prompt is computed: the decode leg goes to it all the same, the policy for failures is not asked
    3. that leg is over: it may go, and is told once; who had nothing planned was told at once
    """
    bench = make_bench(transfer_failure_policy="fail")
    bench.add("p0", P)
    bench.add("d0", D)
    sink = bench.submit("r")
    ((_, prefill),) = bench.take(StartPrefill)
    bench.add("d1", D)
    for worker_id in ("d0", "d1"):
        bench.perform(bench.core.worker_leaving(bench.worker(worker_id)))
    assert [worker_id for worker_id, _ in bench.take(NoMoreLegs)] == ["d1"]
    bench.finish_prefill("p0", prefill.handoff_id)
    ((worker_id, decode),) = bench.take(StartDecode)
    assert worker_id == "d0" and decode.kv_source is not None
    bench.step("d0", prefill.handoff_id, 5, finish="stop")
    assert sink.reports[0].outcome is Outcome.COMPLETED
    for _ in range(2):
        bench.perform(bench.core.tick(bench.now_s))
    assert [worker_id for worker_id, _ in bench.take(NoMoreLegs)] == ["d0"]


def test_a_prefill_worker_is_dismissed_when_its_kv_has_been_read(bench):
    """
    1. its prompt is computed and it leaves: the decode worker has yet to read, so it stays
    2. the decode worker's first token says that the KV is there
    """
    _, handoff_id = bench.prefilled("r")
    bench.perform(bench.core.worker_leaving(bench.worker("p0")))
    bench.perform(bench.core.tick(1.0))
    assert bench.take(NoMoreLegs) == []
    bench.step("d0", handoff_id, 5)
    bench.perform(bench.core.tick(1.0))
    assert [worker_id for worker_id, _ in bench.take(NoMoreLegs)] == ["p0"]


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
