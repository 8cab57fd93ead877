"""What a replay found, request by request, and summed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.replay.fleet import Fleet
from baton.replay.requests import Request
from baton.replay.settings import ReplaySettings
from baton.workload import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    ttft_s: float
    tpot_s: float

    def __str__(self) -> str:
        return f"{self.ttft_s:g} s / {self.tpot_s * 1000:g} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of one quantity over the served requests, in its own unit."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayResult:
    """Arrays have one entry per request of the trace, in its order."""

    settings: ReplaySettings
    trace_name: str
    cpu_s: float
    """Processor time of the whole replay."""
    arrival_s: Floats
    first_token_s: Floats
    finished_s: Floats
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    num_cached_tokens: Ints
    """Of each prompt, found by the worker that computed it."""
    num_predicted_tokens: Ints
    """The same, as the router expected."""
    prefill_worker: Ints
    decode_worker: Ints
    is_stay: NDArray[np.bool_]
    """Computed where it was decoded although another worker was chosen for prefill."""
    is_served: NDArray[np.bool_]
    """Not: it waited longer than the queue's time-out."""
    busy_s: Floats
    """By worker: time in steps."""
    num_preemptions: int
    num_guarded: int
    """Decisions from which the hotspot guard kept the holders."""
    num_guard_acts: int

    @property
    def ttft_s(self) -> Floats:
        ttft: Floats = (self.first_token_s - self.arrival_s)[self.is_served]
        return ttft

    @property
    def tpot_s(self) -> Floats:
        """Mean time between tokens of each served request with more than one."""
        several = self.is_served & (self.num_output_tokens > 1)
        tpot: Floats = (self.finished_s - self.first_token_s)[several] / (self.num_output_tokens[several] - 1)
        return tpot

    @property
    def hit_ratio(self) -> float:
        """Cached prompt tokens over all prompt tokens of served requests."""
        prompts = int(self.num_prompt_tokens[self.is_served].sum())
        return int(self.num_cached_tokens[self.is_served].sum()) / prompts if prompts else 0.0

    @property
    def stay_ratio(self) -> float:
        """Served requests whose prompt stayed with their decode worker, over all served."""
        return float(self.is_stay[self.is_served].mean()) if self.is_served.any() else 0.0

    @property
    def num_rejected(self) -> int:
        return int((~self.is_served).sum())

    @property
    def makespan_s(self) -> float:
        return float(self.finished_s[self.is_served].max() - self.arrival_s.min())

    @property
    def num_stayed(self) -> int:
        """Prompts that a decode worker computed because it held most of them."""
        return int(self.is_stay.sum())

    @property
    def throughput_per_s(self) -> float:
        """Requests between the 10th and the 90th percent to finish."""
        ends = np.sort(self.finished_s[self.is_served])
        low, high = len(ends) // 10, len(ends) * 9 // 10
        return (high - low) / float(ends[high] - ends[low]) if high > low else 0.0

    @property
    def requests_per_cpu_s(self) -> float:
        return len(self.arrival_s) / self.cpu_s

    def goodput(self, slo: Slo) -> float:
        """Share of all requests that met both objectives; a rejected one met none."""
        is_good = self.is_served & (self.first_token_s - self.arrival_s <= slo.ttft_s)
        decode_s = self.finished_s - self.first_token_s
        is_good &= decode_s <= slo.tpot_s * np.maximum(self.num_output_tokens - 1, 0) + 1e-9
        return float(is_good.mean())

    def imbalance(self, workers: Sequence[int]) -> float:
        """Longest busy time over the mean of these workers."""
        busy = self.busy_s[list(workers)]
        return float(busy.max() / busy.mean()) if busy.sum() else 1.0

    @property
    def prefill_imbalance(self) -> float:
        fleet = self.settings.fleet
        both = range(fleet.num_prefill + fleet.num_decode, fleet.num_workers)
        return self.imbalance([*range(fleet.num_prefill), *both])

    @property
    def decode_imbalance(self) -> float:
        fleet = self.settings.fleet
        return self.imbalance(range(fleet.num_prefill, fleet.num_workers))


def spread(values: Floats) -> Spread:
    if not len(values):
        return Spread(mean=0.0, p50=0.0, p95=0.0, p99=0.0)
    p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist()
    return Spread(mean=float(values.mean()), p50=p50, p95=p95, p99=p99)


def result_of(
    trace: Trace, settings: ReplaySettings, requests: Sequence[Request], fleet: Fleet, cpu_s: float
) -> ReplayResult:
    guard = fleet.guard.counters if fleet.guard is not None else None
    return ReplayResult(
        settings=settings,
        trace_name=trace.name,
        cpu_s=cpu_s,
        arrival_s=np.array([r.arrival_s for r in requests]),
        first_token_s=np.array([r.first_token_s for r in requests]),
        finished_s=np.array([r.finished_s for r in requests]),
        num_prompt_tokens=trace.num_prompt_tokens,
        num_output_tokens=trace.num_output_tokens,
        num_cached_tokens=np.array([r.num_cached_tokens for r in requests], np.int64),
        num_predicted_tokens=np.array([r.num_predicted_tokens for r in requests], np.int64),
        prefill_worker=np.array([r.prefill for r in requests], np.int64),
        decode_worker=np.array([r.decode for r in requests], np.int64),
        is_stay=np.array([r.is_stay for r in requests], np.bool_),
        is_served=np.array([not r.is_expired for r in requests], np.bool_),
        busy_s=np.array([member.worker.busy_s for member in fleet.members]),
        num_preemptions=sum(member.worker.places.num_preemptions for member in fleet.members),
        num_guarded=guard.num_diverted if guard is not None else 0,
        num_guard_acts=guard.num_acted if guard is not None else 0,
    )
