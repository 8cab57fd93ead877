"""A decode worker is lost while a client reads: the answer goes on elsewhere, or is refused by name."""

from __future__ import annotations

import pytest

from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    KvSource,
    PrefillFinished,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    TopLogprob,
    WorkerLoad,
)
from baton.contract.sampling import StructuredOutput
from baton.contract.tokens import unpack_token_ids
from coordinator.recovery import FRUITFUL_TOKENS

P, D, B = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH
STREAMS = {"stream_params": {"engine": "e"}}


@pytest.fixture
def bench(make_bench):
    """1P2D."""
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D)
    bench.add("d1", D)
    return bench


def decoding(bench, *token_ids, **sampling):
    """A request whose client was given 100 by the prefill worker and these: (sink, worker, handoff id)."""
    sink, handoff_id = bench.prefilled("r", **sampling)
    ((worker_id, _),) = bench.take(StartDecode)
    if token_ids:
        bench.step(worker_id, handoff_id, *token_ids)
    return sink, worker_id, handoff_id


def lose(bench, worker_id):
    bench.perform(bench.core.worker_lost(worker_id, "killed", bench.now_s))


def test_a_lost_decode_worker_costs_no_token_and_repeats_none(bench):
    """
    1. the client has 3 of 8 tokens; the decode worker dies
    2. the prompt and these 3 go to a prefill worker, with what is left of the client's wishes
    3. its token is the 4th; the other decode worker is given all 4 and goes on
    4. the report is that of an unbroken run, and says that it was resumed
    """
    sink, lost, _ = decoding(bench, 5, 6, max_tokens=8, min_tokens=7)
    bench.now_s = 1.0
    lose(bench, lost)
    ((_, prefill),) = bench.take(StartPrefill)
    assert unpack_token_ids(prefill.prompt_token_ids) == [*range(20), 100, 5, 6]
    assert (prefill.sampling.max_tokens, prefill.sampling.min_tokens) == (5, 4)  # 3 of each are given
    assert prefill.num_given_tokens == 3
    assert prefill.keep_kv
    bench.finish_prefill("p0", prefill.handoff_id, token_id=7, num_cached_tokens=16)
    ((other, decode),) = bench.take(StartDecode)
    assert other != lost
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20), 100, 5, 6, 7]
    assert (decode.num_given_tokens, decode.sampling.max_tokens) == (4, 4)
    bench.now_s = 3.0
    bench.step(other, decode.handoff_id, 8, 9, 10, 11, finish="length")
    assert sink.token_ids == [100, 5, 6, 7, 8, 9, 10, 11]
    (report,) = sink.reports
    assert (report.outcome, report.finish_reason) == (Outcome.COMPLETED, "length")
    assert (report.num_prompt_tokens, report.num_output_tokens) == (20, 8)
    assert report.num_cached_tokens == 4  # of the client's prompt, found by the first attempt
    assert (report.num_resumes, report.placement.num_attempts) == (1, 2)
    assert report.placement.decode_worker == other
    assert report.phases.decode_s == 3.0  # the first token came at 0
    assert report.kv_bytes == 4096  # moved twice
    bench.assert_nothing_is_held()


def test_room_is_promised_for_the_longer_prompt_and_the_shorter_rest(bench):
    _, lost, _ = decoding(bench, *range(30), max_tokens=100)
    lose(bench, lost)
    other = next(name for name in ("d0", "d1") if name != lost)
    # 20 + 31 given + 69 left = 120 tokens, as at the beginning
    assert bench.worker(other).account.num_reserved_blocks == 8  # ceil(120 / 16)
    assert bench.worker("p0").account.num_queued_tokens == 51


def test_what_the_worker_had_sent_before_it_was_given_up_is_dropped(bench):
    sink, lost, handoff_id = decoding(bench, 5)
    bench.fail(lost, handoff_id, "engine_failed")
    bench.step(lost, handoff_id, 6)
    assert sink.token_ids == [100, 5]


@pytest.mark.parametrize("code", ["engine_failed", "kv_transfer_failed", "aborted"])
def test_a_leg_that_fails_is_resumed_on_the_other_worker(bench, code):
    """An abort that nobody asked for, too: a worker that leaves before its streams are over says so."""
    _, lost, handoff_id = decoding(bench, 5)
    bench.fail(lost, handoff_id, code)
    ((_, prefill),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", prefill.handoff_id, token_id=6)
    ((other, _),) = bench.take(StartDecode)
    assert other != lost


def test_a_worker_that_falls_silent_is_told_to_stop_and_the_stream_goes_on_elsewhere(bench):
    sink, silent, handoff_id = decoding(bench, 5)
    bench.perform(bench.core.tick(61.0))
    assert [(w, m.handoff_id) for w, m in bench.take(AbortLeg)] == [(silent, handoff_id)]
    ((_, prefill),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", prefill.handoff_id, token_id=6)
    ((other, _),) = bench.take(StartDecode)
    assert other != silent and not sink.reports


@pytest.mark.parametrize("code", ["engine_failed", "kv_transfer_failed"])
def test_a_decode_worker_that_fails_all_it_is_given_costs_nobody_an_answer(make_bench, code):
    """
    1. one decode worker fails every hand-off at once, and every prompt it is to compute again; so it has
       always the smallest batch
    2. each request is tried with it once, and then goes on elsewhere while there is room
    """
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D)
    bench.add("d1", D)
    for number in range(7):
        sink = bench.submit(f"r{number}", max_tokens=8)
        while starts := bench.take(StartPrefill):
            bench.finish_prefill("p0", starts[0][1].handoff_id)
        while (order := bench.take(StartDecode)) and order[0][0] == "d0":
            bench.fail("d0", order[0][1].handoff_id, code)
        assert not sink.reports
    assert bench.worker("d0").account.num_legs == 0


def test_the_worker_that_failed_is_asked_again_when_nobody_else_is_there(make_bench):
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D)
    _, lost, handoff_id = decoding(bench, 5)
    bench.fail(lost, handoff_id, "engine_failed")
    assert len(bench.take(StartPrefill)) == 1


def test_without_another_worker_it_waits_for_one_and_its_end_names_both_reasons(make_bench):
    bench = make_bench(queue_timeout_s=10.0)
    bench.add("p0", P)
    bench.add("d0", D)
    sink, _, _ = decoding(bench, 5)
    bench.perform(bench.core.worker_registered(bench.worker("d0").registration, b"again", 1.0))
    ((_, prefill),) = bench.take(StartPrefill)  # it came back under its name
    lose(bench, "d0")
    assert bench.take(AbortLeg) == [("p0", AbortLeg(handoff_id=prefill.handoff_id))]
    bench.perform(bench.core.tick(12.0))
    (report,) = sink.reports
    assert report.outcome is Outcome.EXPIRED
    assert report.error.message == (
        "no progress in queued for 10 s, after worker d0 was lost in prefilling: killed"
    )
    bench.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"seed": 1}, "seeded sampling"),
        ({"presence_penalty": 0.5}, "penalties"),
        ({"bad_words": ["no"]}, "bad words"),
        ({"structured_output": StructuredOutput(json_object=True)}, "structured output"),
    ],
    ids=["seed", "penalty", "bad-words", "structured"],
)
def test_what_cannot_be_moved_is_refused_by_name(bench, sampling, reason):
    sink, lost, _ = decoding(bench, 5, **sampling)
    lose(bench, lost)
    error = sink.reports[0].error
    assert (error.code, error.phase, error.worker_id) == ("cannot_resume", "decoding", lost)
    assert f"worker {lost} was lost in decoding: killed; it cannot go on elsewhere: {reason}" in error.message
    bench.assert_nothing_is_held()


@pytest.mark.parametrize("sampling", [{"seed": 1}, {"structured_output": StructuredOutput(json_object=True)}],
                         ids=["seed", "structured"])  # fmt: skip
def test_before_its_first_token_anything_can_begin_again(bench, sampling):
    sink, lost, _ = decoding(bench, **sampling)
    lose(bench, lost)
    ((_, prefill),) = bench.take(StartPrefill)
    assert unpack_token_ids(prefill.prompt_token_ids) == [*range(20)] and not sink.reports


@pytest.mark.parametrize(
    "sampling",
    [{"seed": 1, "temperature": 0.0}, {"stop": ["END"]}, {"repetition_penalty": 1.2}, {"logprobs": 2},
     {"stop_token_ids": [3]}, {"logit_bias": {3: 1.0}}],
    ids=["greedy-seed", "stop", "repetition", "logprobs", "stop-token", "bias"],
)  # fmt: skip
def test_what_depends_on_tokens_alone_is_moved(bench, sampling):
    sink, lost, _ = decoding(bench, 5, **sampling)
    lose(bench, lost)
    assert not sink.reports and len(bench.take(StartPrefill)) == 1


def test_prompt_logprobs_are_given_once(bench):
    """They came with the first prefill: no later leg is asked for them, and its hits count again."""
    sink = bench.submit("r", prompt_logprobs=1)
    ((_, start),) = bench.take(StartPrefill)
    logprobs = [None, [TopLogprob(1, -0.5, 1, "b")]]
    finished = PrefillFinished(
        delta=SequenceDelta(start.handoff_id, [100], "x"),
        kv_source=KvSource(lease_s=30.0, num_tokens=20, num_bytes=2048, transfer_params={}),
        prompt_logprobs=logprobs, queue_s=0.0, prefill_s=0.0, load=WorkerLoad(),
    )  # fmt: skip
    bench.perform(bench.core.prefill_finished(bench.worker("p0"), finished, 0.0))
    ((worker_id, decode),) = bench.take(StartDecode)
    assert decode.sampling.prompt_logprobs is None
    bench.step(worker_id, start.handoff_id, 5)
    lose(bench, worker_id)
    ((_, prefill),) = bench.take(StartPrefill)
    assert prefill.sampling.prompt_logprobs is None
    bench.finish_prefill("p0", prefill.handoff_id, token_id=6)
    ((worker_id, decode),) = bench.take(StartDecode)
    assert decode.sampling.prompt_logprobs is None
    bench.step(worker_id, decode.handoff_id, 7, finish="stop")
    assert sink.reports[0].prompt_logprobs == logprobs


def test_a_last_token_needs_no_decode_worker(bench):
    sink, lost, _ = decoding(bench, 5, max_tokens=3)
    lose(bench, lost)
    ((_, prefill),) = bench.take(StartPrefill)
    assert not prefill.keep_kv and prefill.sampling.max_tokens == 1
    bench.finish_prefill("p0", prefill.handoff_id, token_id=6, finish="length")
    assert sink.token_ids == [100, 5, 6]
    assert sink.reports[0].outcome is Outcome.COMPLETED
    bench.assert_nothing_is_held()


def test_a_first_token_is_gone_on_from_when_the_decode_worker_dies_before_its_own(bench):
    sink, lost, _ = decoding(bench)
    lose(bench, lost)
    ((_, prefill),) = bench.take(StartPrefill)
    assert unpack_token_ids(prefill.prompt_token_ids) == [*range(20), 100]
    bench.finish_prefill("p0", prefill.handoff_id, token_id=5, text="")  # half a character
    ((worker_id, decode),) = bench.take(StartDecode)
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20), 100]
    bench.step(worker_id, decode.handoff_id, 5, 6, finish="stop")
    assert sink.token_ids == [100, 5, 6]
    assert sink.reports[0].placement.first_token_by is P  # of the first token, not of the fifth's worker
    assert sink.reports[0].num_resumes == 1


def test_two_losses_in_one_request(bench):
    sink, lost, _ = decoding(bench, 5, max_tokens=20)
    lose(bench, lost)
    ((_, prefill),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", prefill.handoff_id, token_id=6)
    ((other, decode),) = bench.take(StartDecode)
    bench.step(other, decode.handoff_id, 7)
    bench.add("d2", D)
    lose(bench, other)
    ((_, prefill),) = bench.take(StartPrefill)
    assert unpack_token_ids(prefill.prompt_token_ids) == [*range(20), 100, 5, 6, 7]
    bench.finish_prefill("p0", prefill.handoff_id, token_id=8)
    ((_, decode),) = bench.take(StartDecode)
    bench.step("d2", decode.handoff_id, 9, finish="stop")
    assert sink.token_ids == [100, 5, 6, 7, 8, 9]
    assert sink.reports[0].num_resumes == 2
    bench.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("num_tokens", "num_losses"),
    [(FRUITFUL_TOKENS, 12), (FRUITFUL_TOKENS - 1, 3)],
    ids=["gets on", "does not"],
)
def test_a_request_that_gets_on_survives_any_number_of_losses(make_bench, num_tokens, num_losses):
    """And one that does not, perhaps because it kills what it meets, has max_attempts."""
    bench = make_bench(max_attempts=3)
    bench.add("p0", P)
    bench.add("d0", D)
    sink = bench.submit("r", max_tokens=400)
    for _ in range(num_losses):
        assert not sink.reports
        ((_, prefill),) = bench.take(StartPrefill)
        bench.finish_prefill("p0", prefill.handoff_id)
        ((worker_id, decode),) = bench.take(StartDecode)
        bench.step(worker_id, decode.handoff_id, *range(num_tokens - 1))
        bench.fail(worker_id, decode.handoff_id, "engine_failed")
    assert bool(sink.reports) == (num_tokens < FRUITFUL_TOKENS)


@pytest.mark.parametrize("num_given", [0, 3])
def test_workers_for_both_phases_go_on_from_each_other(make_bench, num_given):
    bench = make_bench()
    bench.add("b0", B)
    bench.add("b1", B)
    sink = bench.submit("r", max_tokens=6)
    ((lost, decode),) = bench.take(StartDecode)
    if num_given:
        bench.step(lost, decode.handoff_id, *range(num_given))
    lose(bench, lost)
    ((other, decode),) = bench.take(StartDecode)
    assert other != lost and decode.kv_source is None
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20), *range(num_given)]
    assert decode.num_given_tokens == num_given
    bench.step(other, decode.handoff_id, *range(num_given, 6), finish="length")
    assert sink.token_ids == [*range(6)]
    assert sink.reports[0].num_resumes == (num_given > 0)
    bench.assert_nothing_is_held()


def test_a_stream_of_kv_is_resumed_as_a_stream(make_bench):
    """
    1. both legs begin together; the decode worker dies after 2 tokens: both legs of the next attempt are
       given prompt and tokens, and the KV of all of them is announced
    2. the decode worker samples the 3rd token itself
    """
    bench = make_bench()
    bench.add("p0", P, **STREAMS)
    bench.add("d0", D, **STREAMS)
    bench.add("d1", D, **STREAMS)
    sink = bench.submit("r", max_tokens=4)
    ((lost, first),) = bench.take(StartDecode)
    bench.take(StartPrefill)
    bench.finish_prefill("p0", first.handoff_id)
    bench.step(lost, first.handoff_id, 5, 6)
    lose(bench, lost)
    ((_, prefill),) = bench.take(StartPrefill)
    ((other, decode),) = bench.take(StartDecode)
    assert prefill.prompt_token_ids == decode.prompt_token_ids
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20), 5, 6]
    assert decode.kv_source.is_streamed and decode.kv_source.num_tokens == 22
    assert (decode.num_given_tokens, decode.sampling.max_tokens) == (2, 2)
    bench.finish_prefill("p0", prefill.handoff_id)
    bench.step(other, decode.handoff_id, 7, 8, finish="length")
    assert sink.token_ids == [5, 6, 7, 8]
    bench.assert_nothing_is_held()


# ── the prefill worker dies ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_streamed", [False, True], ids=["read", "streamed"])
def test_a_prefill_worker_that_dies_while_its_kv_moves_sends_the_request_elsewhere(make_bench, is_streamed):
    """
    1. the prompt is computed and its KV on the way when its worker dies: the decode worker, which waits
       for it, is told to stop at once
    2. another prefill worker computes it; the client has no token twice
    """
    streams = STREAMS if is_streamed else {}
    bench = make_bench()
    bench.add("p0", P, **streams)
    bench.add("d0", D, **streams)
    sink, handoff_id = bench.prefilled("r", max_tokens=3)
    bench.take(StartDecode)
    bench.add("p1", P, **streams)
    lose(bench, "p0")
    assert bench.take(AbortLeg) == [("d0", AbortLeg(handoff_id=handoff_id))]
    ((worker_id, prefill),) = bench.take(StartPrefill)
    num_given = 0 if is_streamed else 1
    assert worker_id == "p1"
    assert unpack_token_ids(prefill.prompt_token_ids) == [*range(20), 100][: 20 + num_given]
    bench.step("d0", handoff_id, 77)  # it had all of it after all: too late
    bench.finish_prefill("p1", prefill.handoff_id, token_id=101)
    ((_, decode),) = bench.take(StartDecode)
    bench.step("d0", decode.handoff_id, 102, finish="stop")
    assert sink.token_ids == ([102] if is_streamed else [100, 101, 102])
    assert sink.reports[0].outcome is Outcome.COMPLETED
    bench.assert_nothing_is_held()


def test_a_prefill_worker_that_dies_after_its_kv_was_read_is_not_missed(bench):
    sink, _, _ = decoding(bench, 5)
    lose(bench, "p0")
    assert bench.take(AbortLeg) == [] and not sink.reports


def test_many_lost_at_once_keep_their_order(make_bench):
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D)
    for name in "abc":
        bench.submit(name)
        ((_, start),) = bench.take(StartPrefill)
        bench.finish_prefill("p0", start.handoff_id)
        bench.step("d0", start.handoff_id, 5)
    lose(bench, "d0")
    bench.add("d0", D, boot_id="new")
    assert [start.request_id for _, start in bench.take(StartPrefill)] == ["a", "b", "c"]


# ── one leg fails: the other is told in the same breath ──────────────────────────────────────


@pytest.mark.parametrize("is_streamed", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("failing", ["p0", "d0"])
def test_a_leg_that_fails_ends_the_other_in_the_same_breath(make_bench, failing, is_streamed):
    """Where both have work: while KV is read, or from the first moment of a stream on."""
    streams = STREAMS if is_streamed else {}
    bench = make_bench()
    bench.add("p0", P, **streams)
    bench.add("d0", D, **streams)
    bench.submit("r")
    ((_, prefill),) = bench.take(StartPrefill)
    if not is_streamed:
        bench.finish_prefill("p0", prefill.handoff_id)
    bench.take(StartDecode)
    bench.fail(failing, prefill.handoff_id)
    other = {"p0": "d0", "d0": "p0"}[failing]
    assert (other, AbortLeg(handoff_id=prefill.handoff_id)) in bench.take(AbortLeg)


def test_a_reservation_whose_source_is_not_heard_of_holds_no_request(make_bench):
    """
    1. the prompt is computed, its last blocks never arrive: the decode worker may not free what it reserved
       before its source is proven dead, which may be never
    2. the request waits for the hand-off's time only: both are told to stop, the prompt is computed anew
    """
    bench = make_bench(handoff_timeout_s=20.0)
    bench.add("p0", P, **STREAMS)
    bench.add("d0", D, **STREAMS)
    sink, handoff_id = bench.prefilled("r")
    bench.take(StartDecode)
    bench.perform(bench.core.tick(20.1))
    assert sorted(worker_id for worker_id, _ in bench.take(AbortLeg)) == ["d0", "p0"]
    ((worker_id, decode),) = bench.take(StartDecode)
    assert decode.kv_source is None and decode.handoff_id != handoff_id
    bench.step(worker_id, decode.handoff_id, 5, finish="stop")
    assert sink.reports[0].outcome is Outcome.COMPLETED
    bench.assert_nothing_is_held()
