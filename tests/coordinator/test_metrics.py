"""What a scrape shows after known requests."""

from __future__ import annotations

import pytest

from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import PhaseTimes, Placement, RequestReport
from coordinator.metrics import MAX_LABELS, Metrics

PHASES = PhaseTimes(queue_s=0.01, prefill_s=0.2, handoff_s=0.03, decode_s=0.9)


def scraped(metrics: Metrics) -> dict[str, float]:
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def report(first_token_by: WorkerRole) -> RequestReport:
    placement = Placement(first_token_by=first_token_by, first_token_reason="rule", num_attempts=2)
    return RequestReport(
        outcome=Outcome.COMPLETED, num_prompt_tokens=100, num_output_tokens=11, num_cached_tokens=32,
        kv_bytes=4096, placement=placement, phases=PHASES,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("by", "ttft", "tpot"),
    [
        (WorkerRole.PREFILL, 0.21, 0.093),  # 0.01 + 0.2; (0.03 + 0.9) / 10
        (WorkerRole.DECODE, 0.24, 0.09),  # 0.01 + 0.2 + 0.03; 0.9 / 10
    ],
    ids=["prefill", "decode"],
)
def test_times_depend_on_who_sampled_the_first_token(by, ttft, tpot):
    metrics = Metrics()
    metrics.on_finished(report(by))
    values = scraped(metrics)
    assert values["baton_time_to_first_token_seconds_sum"] == pytest.approx(ttft)
    assert values["baton_time_per_output_token_seconds_sum"] == pytest.approx(tpot)
    assert values["baton_e2e_request_latency_seconds_sum"] == pytest.approx(1.14)
    assert values['baton_time_to_first_token_seconds_bucket{le="0.1"}'] == 0
    assert values['baton_time_to_first_token_seconds_bucket{le="0.25"}'] == 1
    assert values['baton_time_to_first_token_seconds_bucket{le="+Inf"}'] == 1
    assert values[f'baton_first_token_total{{by="{by.value}",reason="rule"}}'] == 1
    assert values["baton_kv_bytes_total"] == 4096
    assert values["baton_output_tokens_total"] == 11
    assert values["baton_retries_total"] == 1
    assert values['baton_requests_total{outcome="completed"}'] == 1


def test_a_failure_counts_once_and_adds_no_latency():
    metrics = Metrics()
    error = ErrorReport(code="worker_lost", message="gone")
    metrics.on_finished(RequestReport(outcome=Outcome.FAILED, error=error, phase="decoding"))
    metrics.on_refused("queue_full")
    values = scraped(metrics)
    assert values['baton_requests_total{outcome="failed"}'] == 1
    assert values['baton_request_errors_total{code="worker_lost",phase="decoding"}'] == 1
    assert values['baton_requests_refused_total{code="queue_full"}'] == 1
    assert values["baton_e2e_request_latency_seconds_count"] == 0


def test_gauges_are_read_when_scraped():
    metrics = Metrics()
    now = {"prefill": 1.0}
    metrics.add_gauge("baton_workers", "Workers up.", lambda: now, label="role")
    metrics.add_gauge("baton_queued", "Waiting.", lambda: 7)
    now["decode"] = 2.0
    values = scraped(metrics)
    assert values['baton_workers{role="decode"}'] == 2
    assert values["baton_queued"] == 7


def test_labels_are_bounded():
    metrics = Metrics()
    for number in range(MAX_LABELS + 50):
        metrics.on_refused(f"code{number}")
    values = scraped(metrics)
    assert values['baton_requests_refused_total{code="other"}'] == 50
