"""Workers that stream: the decode worker is told when the prefill begins."""

from __future__ import annotations

import pytest

from baton.contract.lifecycle import Outcome, RequestState, WorkerRole
from baton.contract.messages import AbortLeg, StartDecode, StartPrefill
from baton.contract.tokens import unpack_token_ids

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
    assert sink.reports[0].outcome is Outcome.COMPLETED
    assert sink.reports[0].kv_bytes == 2048
    bench.assert_nothing_is_held()


def test_the_first_token_may_overtake_the_word_of_the_prefill_worker(bench):
    sink, prefill, _ = begin(bench, max_tokens=2)
    bench.step("d0", prefill.handoff_id, 5)
    bench.finish_prefill("p0", prefill.handoff_id)
    assert [worker_id for worker_id, _ in bench.take(AbortLeg)] == ["p0"]  # nothing left to hold there
    bench.step("d0", prefill.handoff_id, 6, finish="length")
    assert sink.token_ids == [5, 6]
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
    ("prefill", "decode", "sampling"),
    [
        ({"stream_params": None}, {"stream_params": DECODE}, {}),
        ({"stream_params": PREFILL}, {"stream_params": None}, {}),
        ({"stream_params": PREFILL, "pipeline_parallel_size": 2}, {"stream_params": DECODE}, {}),
        ({"stream_params": PREFILL}, {"stream_params": DECODE}, {"prompt_logprobs": 1}),
        ({"stream_params": PREFILL}, {"stream_params": DECODE}, {"max_tokens": 1}),
    ],
    ids=["source-pulls", "destination-pulls", "other-stages", "prompt-logprobs", "one-token"],
)
def test_what_cannot_be_streamed_is_pulled(make_bench, prefill, decode, sampling):
    bench = make_bench()
    bench.add("p0", WorkerRole.PREFILL, **prefill)
    bench.add("d0", WorkerRole.DECODE, **decode)
    bench.submit("r", **sampling)
    assert bench.take(StartDecode) == []
    assert bench.core._requests["r"].state is RequestState.PREFILLING
