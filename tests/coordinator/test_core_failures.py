"""Aborts, lost workers, failed transfers, deadlines: what becomes of a request that does not go well."""

from __future__ import annotations

from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    StartDecode,
    StartPrefill,
)
from baton.contract.tokens import unpack_token_ids

P, D = WorkerRole.PREFILL, WorkerRole.DECODE


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


def test_an_accepted_prompt_that_a_later_worker_cannot_hold_goes_to_another(make_bench):
    """
    1. a prompt is accepted by the limits of then, and waits
    2. the worker that gets it has joined since, with a smaller limit, and says no
    3. that is no mistake of the client's: another worker computes it
    """
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D, max_batch_size=1)
    bench.submit("first", max_tokens=2)
    sink = bench.submit("r", num_prompt_tokens=300)
    bench.perform(bench.core.worker_lost("p0", "replaced", bench.now_s))
    bench.add("p1", P, max_model_len=256)
    bench.perform(bench.core.abort("first", bench.now_s))
    worker_id, start = bench.take(StartPrefill)[-1]
    assert (worker_id, start.request_id) == ("p1", "r")
    bench.add("p2", P)
    bench.fail("p1", start.handoff_id, "context_length_exceeded")
    assert not sink.reports
    ((worker_id, _),) = bench.take(StartPrefill)
    assert worker_id == "p2"


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
