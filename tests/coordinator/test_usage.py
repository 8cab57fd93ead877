"""users' pain 14: one usage record for each accepted request, however it ended."""

from __future__ import annotations

import pytest

from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import StartDecode, StartPrefill

P, D = WorkerRole.PREFILL, WorkerRole.DECODE


def aborted(bench, request_id="r"):
    bench.perform(bench.core.abort(request_id, bench.now_s))
    (report,) = bench.sinks[request_id].reports
    assert report.outcome is Outcome.ABORTED
    assert report.num_output_tokens == len(bench.sinks[request_id].token_ids)
    return report


def used(report):
    return report.phase, report.num_prefilled_tokens, report.num_output_tokens


def test_a_request_that_completes_has_its_tokens_and_no_phase(bench):
    sink, handoff_id = bench.prefilled("r")  # 20 tokens, 4 of them cached
    bench.step("d0", handoff_id, 1, 2, finish="stop")
    assert used(sink.reports[0]) == (None, 16, 3)
    assert bench.core.num_discarded_tokens == 0


@pytest.mark.parametrize("phase", ["queued", "prefilling", "handing_off", "decoding"])
def test_a_cancelled_request_says_where_it_was_and_what_it_had_cost(make_bench, phase):
    """What workers still send of it afterwards is counted as discarded."""
    bench = make_bench()
    bench.add("p0", P)
    if phase == "queued":
        bench.add("d0", D, num_blocks=2)
        bench.submit("first")
        bench.submit("r")
        assert used(aborted(bench)) == ("queued", 0, 0)
        return
    bench.add("d0", D)
    bench.submit("r")
    ((_, start),) = bench.take(StartPrefill)
    if phase == "prefilling":
        assert used(aborted(bench)) == ("prefilling", 0, 0)
        bench.finish_prefill("p0", start.handoff_id)
        assert bench.core.num_discarded_tokens == 1
        return
    bench.finish_prefill("p0", start.handoff_id)
    if phase == "handing_off":
        assert used(aborted(bench)) == ("handing_off", 16, 1)
        return
    bench.step("d0", start.handoff_id, 5, 6)
    report = aborted(bench)
    assert used(report) == ("decoding", 16, 3)
    assert (report.placement.prefill_worker, report.placement.decode_worker) == ("p0", "d0")
    bench.step("d0", start.handoff_id, 7, 8)
    assert bench.core.num_discarded_tokens == 2


def test_a_prompt_that_was_computed_twice_counts_twice(bench):
    sink, handoff_id = bench.prefilled("r")
    bench.take(StartDecode)
    bench.fail("d0", handoff_id)
    ((_, again),) = bench.take(StartDecode)
    bench.step("d0", again.handoff_id, 5, finish="stop")
    assert used(sink.reports[0]) == (None, 16 + 21, 2)  # with the token that was given


def test_a_first_token_that_is_sampled_again_is_sent_once(bench):
    """With a seed the decode worker samples all tokens; the prefill worker's is discarded."""
    sink, handoff_id = bench.prefilled("r", seed=1)
    bench.step("d0", handoff_id, 5, finish="stop")
    assert used(sink.reports[0]) == (None, 16, 1)
    assert bench.core.num_discarded_tokens == 1
