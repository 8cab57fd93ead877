"""Prometheus metrics of the coordinator.

Everything runs on one event loop, so the counts are plain numbers that no lock guards; a collector
turns them into prometheus_client's families when someone scrapes. Recording a finished request
costs about 4 us in all, and nothing is recorded per token: TPOT is observed once per request.

The core calls `on_finished` for each submission it accepted; the doors call `on_refused` for what
they or the core turned away. What is true now (requests in flight, workers) is read at scrape time
through `add_gauge`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from baton.contract.messages import RequestReport
from coordinator.first_token import seconds_to_first_token

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TPOT_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
    0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
MAX_LABELS = 100
"""Distinct label values per metric; further ones are counted as `other`."""

Reading = float | Mapping[str, float]


class Histogram:
    """Counts per bucket, cumulative only when read."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, help: str) -> HistogramMetricFamily:
        total = 0
        buckets = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return HistogramMetricFamily(name, help, buckets=buckets, sum_value=self._sum)


class LabelledCounter:
    """Counts by one or more label values, bounded in number."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, *labels: str) -> None:
        count = self._counts.get(labels)
        if count is None:
            if len(self._counts) >= MAX_LABELS:
                labels = ("other",) * len(labels)
            count = self._counts.get(labels, 0)
        self._counts[labels] = count + 1

    def family(self, name: str, help: str, labels: tuple[str, ...]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, help, labels=labels)
        for values, count in self._counts.items():
            family.add_metric(values, count)
        return family


class Metrics(Collector):
    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._outcomes = LabelledCounter()
        self._errors = LabelledCounter()
        self._refusals = LabelledCounter()
        self._first_tokens = LabelledCounter()
        self._ways = LabelledCounter()
        self._handoffs = LabelledCounter()
        self._num_prompt_tokens = 0
        self._num_prefilled_tokens = 0
        self._num_cached_tokens = 0
        self._num_predicted_hit_tokens = 0
        self._hit_predictions = LabelledCounter()
        self._num_output_tokens = 0
        self._kv_bytes = 0
        self._num_retries = 0
        self._num_resumes = 0
        self._queue = Histogram(TTFT_BUCKETS_S)
        self._prefill = Histogram(TTFT_BUCKETS_S)
        self._handoff = Histogram(TTFT_BUCKETS_S)
        self._decode = Histogram(TTFT_BUCKETS_S)
        self._ttft = Histogram(TTFT_BUCKETS_S)
        self._tpot = Histogram(TPOT_BUCKETS_S)
        self._e2e = Histogram(TTFT_BUCKETS_S)
        self._gauges: list[tuple[str, str, str, Callable[[], Reading]]] = []

    # ── hooks ─────────────────────────────────────────────────────────────────────────────────

    def on_finished(self, report: RequestReport) -> None:
        """The final word on an accepted submission. Times are of requests that had the phase."""
        self._outcomes.add(report.outcome.value)
        if report.error is not None:
            self._errors.add(report.error.code, report.error.phase or report.phase or "")
        num_output = report.num_output_tokens
        self._num_prompt_tokens += report.num_prompt_tokens
        self._num_prefilled_tokens += report.num_prefilled_tokens
        self._num_cached_tokens += report.num_cached_tokens
        self._num_output_tokens += num_output
        self._kv_bytes += report.kv_bytes
        placement = report.placement
        self._num_retries += placement.num_attempts - 1
        self._num_resumes += report.num_resumes
        if placement.way is not None:
            self._ways.add(placement.way.value, placement.way_reason or "")
        if placement.transfer is not None:
            self._handoffs.add(placement.transfer.value, placement.transfer_reason or "")
        predicted, found = placement.predicted_hit_tokens, placement.hit_tokens
        if predicted is not None and found is not None:
            self._num_predicted_hit_tokens += predicted
            self._hit_predictions.add(
                "exact" if predicted == found else "too few" if predicted < found else "too many"
            )
        phases = report.phases
        self._queue.observe(phases.queue_s)
        if num_output == 0:
            return
        to_first = seconds_to_first_token(report)
        whole = phases.queue_s + phases.prefill_s + phases.handoff_s + phases.decode_s
        if placement.first_token_by is not None:
            self._first_tokens.add(placement.first_token_by.value, placement.first_token_reason or "")
        self._prefill.observe(phases.prefill_s)
        self._ttft.observe(to_first)
        self._e2e.observe(whole)
        if num_output > 1:
            self._handoff.observe(phases.handoff_s)
            self._decode.observe(phases.decode_s)
            self._tpot.observe((whole - to_first) / (num_output - 1))

    def on_refused(self, code: str) -> None:
        """Turned away before anything was accepted."""
        self._refusals.add(code)

    def add_gauge(self, name: str, help: str, read: Callable[[], Reading], *, label: str = "") -> None:
        """A value read at scrape time; with `label`, `read` gives one value per label value."""
        self._gauges.append((name, help, label, read))

    # ── scraping ──────────────────────────────────────────────────────────────────────────────

    def render(self) -> tuple[bytes, str]:
        """(body, content type)"""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        yield self._outcomes.family("baton_requests", "Finished requests by outcome.", ("outcome",))
        yield self._errors.family(
            "baton_request_errors", "Accepted, then failed, by code and phase.", ("code", "phase")
        )
        yield self._refusals.family("baton_requests_refused", "Requests never accepted, by code.", ("code",))
        yield self._first_tokens.family(
            "baton_first_token", "Who sampled the first token, and by which rule.", ("by", "reason")
        )
        yield self._ways.family(
            "baton_ways", "Requests by the way they were served, and why.", ("way", "reason")
        )
        yield self._handoffs.family(
            "baton_handoffs",
            "Requests handed from worker to worker, by how their KV went, and why it was pulled.",
            ("transfer", "reason"),
        )
        yield self._hit_predictions.family(
            "baton_hit_predictions",
            "Prefills by how the predicted hit compares with the engine's.",
            ("result",),
        )
        for name, help, count in self._totals():
            yield CounterMetricFamily(name, help, value=count)
        for name, help, histogram in self._histograms():
            yield histogram.family(name, help)
        for name, help, label, read in self._gauges:
            reading = read()
            family = GaugeMetricFamily(name, help, labels=(label,) if label else ())
            values = reading.items() if isinstance(reading, Mapping) else (("", reading),)
            for key, value in values:
                family.add_metric((key,) if label else (), value)
            yield family

    def _totals(self) -> Iterable[tuple[str, str, int]]:
        return (
            ("baton_prompt_tokens", "Prompt tokens of finished requests.", self._num_prompt_tokens),
            ("baton_cached_tokens", "Of those, found in a prefix cache.", self._num_cached_tokens),
            (
                "baton_predicted_hit_tokens",
                "Prompt tokens that were expected in a prefix cache.",
                self._num_predicted_hit_tokens,
            ),
            (
                "baton_prefilled_tokens",
                "Prompt tokens computed, all attempts, requests that failed included.",
                self._num_prefilled_tokens,
            ),
            ("baton_output_tokens", "Tokens sent, whatever the outcome.", self._num_output_tokens),
            ("baton_kv_bytes", "KV bytes handed from prefill to decode workers.", self._kv_bytes),
            ("baton_retries", "Attempts beyond the first.", self._num_retries),
            ("baton_resumes", "Of those, went on from tokens the client had.", self._num_resumes),
        )

    def _histograms(self) -> Iterable[tuple[str, str, Histogram]]:
        return (
            ("baton_queue_time_seconds", "Submit to prefill dispatched.", self._queue),
            ("baton_prefill_time_seconds", "Dispatch to prefill finished.", self._prefill),
            (
                "baton_handoff_time_seconds",
                "Prefill finished to the decode worker's first token.",
                self._handoff,
            ),
            ("baton_decode_time_seconds", "First to last token of the decode worker.", self._decode),
            ("baton_time_to_first_token_seconds", "Submit to first token, at the coordinator.", self._ttft),
            ("baton_time_per_output_token_seconds", "Mean gap between a request's tokens.", self._tpot),
            ("baton_e2e_request_latency_seconds", "Submit to last token, at the coordinator.", self._e2e),
        )
