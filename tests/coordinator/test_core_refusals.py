"""Who is refused, with which numbers, and how workers leave."""

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
from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import (
    NoMoreLegs,
    StartDecode,
    StartPrefill,
)
from coordinator.waiting_line import UNMEASURED_RETRY_AFTER_S

P, D = WorkerRole.PREFILL, WorkerRole.DECODE


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
