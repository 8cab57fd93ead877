"""Workers that stream: the decode worker is told when the prefill begins."""

from __future__ import annotations

import pytest

from baton.contract.lifecycle import Outcome, RequestState, Transfer, WorkerRole
from baton.contract.messages import AbortLeg, StartDecode, StartPrefill
from baton.contract.tokens import unpack_token_ids
from coordinator.metrics import Metrics

PREFILL, DECODE = {"engine": "e1"}, {"engine": "e2"}


@pytest.fixture
def bench(make_bench):
    bench = make_bench(prefill_timeout_s=300.0, handoff_timeout_s=20.0)
    bench.add("p0", WorkerRole.PREFILL, stream_params=PREFILL)
    bench.add("d0", WorkerRole.DECODE, stream_params=DECODE)
    return bench


def begin(bench, **sampling):
    sink = bench.submit("r", **sampling)
    ((_, prefill),) = bench.take(StartPrefill)
    ((worker_id, decode),) = bench.take(StartDecode)
    assert worker_id == "d0"
    assert decode.handoff_id == prefill.handoff_id
    return sink, prefill, decode


def test_both_legs_start_together_and_the_decode_worker_gives_all_tokens(bench):
    """
    1. dispatch: both workers hear of it, the decode worker where the KV will come from and for how long
       its reservation may stand
    2. the prefill worker's end only moves the state; its token is nobody's
    3. the decode worker's tokens are the answer
    """
    sink, prefill, decode = begin(bench, max_tokens=3)
    assert decode.kv_source.is_streamed
    assert decode.kv_source.transfer_params == PREFILL
    assert decode.kv_source.num_tokens == 20
    assert decode.kv_source.num_bytes == 2048  # 2 blocks of 16 tokens
    assert decode.kv_source.lease_s == 320.0  # both phases
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20)]
    assert decode.sampling.max_tokens == 3
    assert prefill.sampling.ignore_eos
    bench.finish_prefill("p0", prefill.handoff_id)
    assert bench.take(StartDecode) == []
    assert sink.token_ids == []
    bench.step("d0", prefill.handoff_id, 5)
    bench.step("d0", prefill.handoff_id, 6, 7, finish="length")
    assert sink.token_ids == [5, 6, 7]
    assert sink.placements[0].first_token_reason == "streamed"
    assert sink.placements[0].transfer is Transfer.STREAM
    assert sink.reports[0].outcome is Outcome.COMPLETED
    assert sink.reports[0].kv_bytes == 2048
    bench.assert_nothing_is_held()


def test_tokens_that_overtake_the_word_of_the_prefill_worker_wait_for_it(bench):
    """It is on its way, and nothing that it tells is lost: hits, the prompt's time, the first token."""
    sink, prefill, _ = begin(bench, max_tokens=2)
    bench.step("d0", prefill.handoff_id, 5)
    bench.step("d0", prefill.handoff_id, 6, finish="length")
    assert sink.token_ids == []
    bench.finish_prefill("p0", prefill.handoff_id, num_cached_tokens=16)
    assert sink.token_ids == [5, 6]
    assert sink.reports[0].placement.hit_tokens == 16
    assert bench.take(AbortLeg) == []
    bench.assert_nothing_is_held()


def test_a_word_that_never_comes_begins_the_attempt_again(bench):
    """The prefill worker died between its last write and its word; nobody has heard of either yet."""
    sink, prefill, _ = begin(bench, max_tokens=2)
    bench.step("d0", prefill.handoff_id, 5)
    bench.add("p1", WorkerRole.PREFILL, stream_params=PREFILL)
    bench.perform(bench.core.worker_lost("p0", "gone", 1.0))
    ((_, again),) = bench.take(StartPrefill)
    bench.finish_prefill("p1", again.handoff_id)
    bench.step("d0", again.handoff_id, 7, 8, finish="length")
    assert sink.token_ids == [7, 8]
    assert bench.core.num_discarded_tokens == 2  # the early one, and that of the other prefill worker
    bench.assert_nothing_is_held()


def test_an_abort_in_prefill_reaches_both(bench):
    sink, _, _ = begin(bench)
    bench.perform(bench.core.abort("r", 1.0))
    assert sorted(worker_id for worker_id, _ in bench.take(AbortLeg)) == ["d0", "p0"]
    assert sink.reports[0].outcome is Outcome.ABORTED
    bench.assert_nothing_is_held()


@pytest.mark.parametrize("worker_id", ["p0", "d0"])
def test_either_leg_that_fails_ends_the_attempt_on_both(bench, worker_id):
    _, prefill, _ = begin(bench)
    bench.fail(worker_id, prefill.handoff_id)
    assert {worker_id for worker_id, _ in bench.take(AbortLeg)} == {"d0", "p0"}
    ((_, again),) = bench.take(StartPrefill)
    ((_, decode),) = bench.take(StartDecode)
    assert again.handoff_id == decode.handoff_id != prefill.handoff_id


def test_a_stream_that_fails_after_the_prefill_is_recomputed_on_the_decode_worker(bench):
    _, prefill, _ = begin(bench)
    bench.finish_prefill("p0", prefill.handoff_id)
    bench.fail("d0", prefill.handoff_id)
    ((_, decode),) = bench.take(StartDecode)
    assert decode.kv_source is None
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20)]


def test_a_prefill_worker_that_is_lost_ends_the_decode_leg(bench):
    begin(bench)
    bench.perform(bench.core.worker_lost("p0", "gone", 1.0))
    assert [worker_id for worker_id, _ in bench.take(AbortLeg)] == ["d0"]
    assert bench.core.num_queued == 1


@pytest.mark.parametrize(
    ("prefill", "decode", "sampling", "reason"),
    [
        (None, DECODE, {}, "the prefill worker does not stream"),
        (PREFILL, None, {}, "the decode worker does not stream"),
        (PREFILL, DECODE, {"prompt_logprobs": 1}, "prompt logprobs"),
    ],
    ids=["source-pulls", "destination-pulls", "prompt-logprobs"],
)
def test_what_cannot_be_streamed_is_pulled_and_says_why(make_bench, prefill, decode, sampling, reason):
    bench = make_bench()
    bench.add("p0", WorkerRole.PREFILL, stream_params=prefill)
    bench.add("d0", WorkerRole.DECODE, stream_params=decode)
    sink = bench.submit("r", **sampling)
    assert bench.take(StartDecode) == []
    assert bench.core._requests["r"].state is RequestState.PREFILLING
    ((_, leg),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", leg.handoff_id)
    bench.step("d0", leg.handoff_id, 6, finish="length")
    (report,) = sink.reports
    assert (report.placement.transfer, report.placement.transfer_reason) == (Transfer.PULL, reason)
    metrics = Metrics()
    metrics.on_finished(report)
    counted = f'baton_handoffs_total{{reason="{reason}",transfer="pull"}} 1.0'
    assert counted in metrics.render()[0].decode()


def test_an_answer_of_one_token_is_not_handed_over(bench):
    sink = bench.submit("r", max_tokens=1)
    assert bench.take(StartDecode) == []
    ((_, leg),) = bench.take(StartPrefill)
    bench.finish_prefill("p0", leg.handoff_id, finish="length")
    assert sink.reports[0].placement.transfer is None


@pytest.fixture
def token_bench(make_bench):
    """Workers whose streams bring the first token along."""
    bench = make_bench()
    bench.add("p0", WorkerRole.PREFILL, stream_params=PREFILL, streams_first_token=True)
    bench.add("d0", WorkerRole.DECODE, stream_params=DECODE, streams_first_token=True)
    return bench


def test_the_first_token_is_given_once_and_comes_from_the_prefill_worker(token_bench):
    """
    1. the decode worker hears that the first token comes with the KV; the prefill worker samples for real
    2. the prefill worker's token goes to the client at once
    3. the decode worker tells it again and goes on: the client hears only what follows
    """
    sink, prefill, decode = begin(token_bench, max_tokens=3, stop_token_ids=(9,))
    assert decode.kv_source.has_first_token
    assert decode.sampling.max_tokens == 3
    assert prefill.sampling.stop_token_ids == (9,)
    token_bench.finish_prefill("p0", prefill.handoff_id, token_id=5, text="y")
    assert sink.token_ids == [5]
    token_bench.step("d0", prefill.handoff_id, 5)
    assert len(sink.placements) == 1
    token_bench.step("d0", prefill.handoff_id, 6)
    token_bench.step("d0", prefill.handoff_id, 7, finish="length")
    assert sink.token_ids == [5, 6, 7]
    assert sink.placements[0].first_token_by is WorkerRole.PREFILL
    assert sink.reports[0].num_output_tokens == 3
    token_bench.assert_nothing_is_held()


def test_tokens_of_one_message_lose_only_the_first(token_bench):
    sink, prefill, _ = begin(token_bench, max_tokens=3)
    token_bench.finish_prefill("p0", prefill.handoff_id, token_id=5, text="y")
    token_bench.step("d0", prefill.handoff_id, 5, 6, 7, finish="length")
    assert sink.token_ids == [5, 6, 7]
    token_bench.assert_nothing_is_held()


def test_a_decode_worker_that_is_faster_waits_for_the_first_token_to_be_given(token_bench):
    sink, prefill, _ = begin(token_bench, max_tokens=3)
    token_bench.step("d0", prefill.handoff_id, 5)
    token_bench.step("d0", prefill.handoff_id, 6)
    token_bench.finish_prefill("p0", prefill.handoff_id, token_id=5, text="y")
    token_bench.step("d0", prefill.handoff_id, 7, finish="length")
    assert sink.token_ids == [5, 6, 7]
    token_bench.assert_nothing_is_held()


def test_a_decode_worker_that_begins_with_another_token_is_not_believed(token_bench):
    """
    1. the KV did not arrive and its engine computed the prompt itself: it samples another first token
    2. its leg is taken back, and another one goes on from the token that the client has
    """
    sink, prefill, _ = begin(token_bench, max_tokens=3, temperature=1.0)
    token_bench.finish_prefill("p0", prefill.handoff_id, token_id=5, text="y")
    token_bench.step("d0", prefill.handoff_id, 8)
    assert "d0" in [worker_id for worker_id, _ in token_bench.take(AbortLeg)]
    ((_, decode),) = token_bench.take(StartDecode)
    assert decode.kv_source is None
    assert unpack_token_ids(decode.prompt_token_ids) == [*range(20), 5]
    assert decode.sampling.max_tokens == 2
    token_bench.step("d0", decode.handoff_id, 6)
    token_bench.step("d0", decode.handoff_id, 7, finish="length")
    assert sink.token_ids == [5, 6, 7]
    token_bench.assert_nothing_is_held()


def test_an_answer_of_one_token_ends_the_decode_leg(token_bench):
    """It stops at its first token: whoever says so first, the client hears it once."""
    sink, prefill, _ = begin(token_bench, max_tokens=3)
    token_bench.finish_prefill("p0", prefill.handoff_id, token_id=9, text="y", finish="stop")
    assert [worker_id for worker_id, _ in token_bench.take(AbortLeg)] == ["d0"]
    token_bench.step("d0", prefill.handoff_id, 9, finish="stop")
    assert sink.token_ids == [9]
    assert sink.reports[0].finish_reason == "stop"
    token_bench.assert_nothing_is_held()


def test_a_first_token_inside_a_character_is_told_by_the_decode_worker(token_bench):
    """It has got it with the KV and detokenises from it on, so the second one's text is whole."""
    sink, prefill, _ = begin(token_bench, max_tokens=2)
    token_bench.finish_prefill("p0", prefill.handoff_id, token_id=5, text="")
    assert sink.token_ids == []
    token_bench.step("d0", prefill.handoff_id, 5, text="")
    token_bench.step("d0", prefill.handoff_id, 6, finish="length")
    assert sink.token_ids == [5, 6]
    assert sink.placements[-1].first_token_reason == "partial character"


@pytest.mark.parametrize(
    "sampling",
    [{"seed": 1, "temperature": 1.0}, {"logprobs": 1}, {"stop": ("x",)}],
    ids=lambda s: next(iter(s)),
)
def test_what_the_decode_worker_must_sample_it_samples(token_bench, sampling):
    sink, prefill, decode = begin(token_bench, max_tokens=2, **sampling)
    assert not decode.kv_source.has_first_token
    token_bench.finish_prefill("p0", prefill.handoff_id, token_id=5, text="y")
    assert sink.token_ids == []
    token_bench.step("d0", prefill.handoff_id, 6)
    token_bench.step("d0", prefill.handoff_id, 7, finish="length")
    assert sink.token_ids == [6, 7]
    assert sink.placements[0].first_token_by is WorkerRole.DECODE


def test_what_may_not_fit_on_the_prefill_worker_is_pulled(make_bench):
    """
    1. the prefill worker has 5 blocks of 16 tokens, the decode worker 64
    2. two prompts of two blocks are promised blocks; a third could be computed before them, and fill the
       prefill worker while the blocks for it are promised to those
    3. it is computed all the same, and handed over when it is there
    """
    bench = make_bench()
    bench.add("p0", WorkerRole.PREFILL, stream_params=PREFILL, num_blocks=5)
    bench.add("d0", WorkerRole.DECODE, stream_params=DECODE)
    for number in range(3):
        bench.submit(f"r{number}")
    prefills, decodes = bench.take(StartPrefill), bench.take(StartDecode)
    assert len(prefills) == 3
    assert [decode.handoff_id for _, decode in decodes] == [prefill.handoff_id for _, prefill in prefills[:2]]
    bench.finish_prefill("p0", prefills[2][1].handoff_id)
    ((_, decode),) = bench.take(StartDecode)
    assert not decode.kv_source.is_streamed


def test_what_was_cached_is_told_also_when_the_decode_worker_is_heard_first(token_bench):
    """vllm#46898: a usage whose cached tokens are not those of one worker alone."""
    sink, prefill, _ = begin(token_bench, max_tokens=2, seed=1, temperature=1.0)
    token_bench.step("d0", prefill.handoff_id, 6)
    token_bench.finish_prefill("p0", prefill.handoff_id, token_id=5, text="y", num_cached_tokens=16)
    token_bench.step("d0", prefill.handoff_id, 7, finish="length")
    assert sink.token_ids == [6, 7]
    assert sink.reports[0].num_cached_tokens == 16
    token_bench.assert_nothing_is_held()
