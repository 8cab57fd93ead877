"""The highest rate at which a fleet keeps an SLO, and how sure we are of it.

Coarse scan first, upwards until the first rate that fails, then bisection between it and the last that
passed: a bisection alone believes that attainment falls with the rate, which batching can break.
A finite run hides overload, so a rate must also leave every phase below its capacity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from placement.kernels.capacity import prefill_capacity
from placement.requests import Requests
from placement.simulator import ColocatedFleet, Fleet, SplitFleet, StopEarly, simulate
from placement.slo import Slo, attained, trial_at

SCAN = (0.08, 0.25, 0.45, 0.65, 0.85)
"""Shares of the rate that capacity alone would allow."""
SCAN_UP = (1.03, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 9.0)
"""From a rate that is known to keep."""
AROUND = 0.04
"""How far a hint is trusted."""
FLOOR = 0.002
TOLERANCE = 0.005
"""Bisection ends when it knows the rate to half a percent."""

_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}
"""Student's t, 95 %, two-sided, by number of samples."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over independent request sets, with a 95 % confidence interval."""

    mean: float
    half_width: float
    samples: tuple[float, ...]

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.mean * factor, self.half_width * factor, tuple(s * factor for s in self.samples))


def estimate(samples: Sequence[float]) -> Estimate:
    values = np.asarray(samples)
    if len(values) < 2:
        return Estimate(float(values.mean()), math.inf, tuple(values.tolist()))
    fallback = min((n for n in _T_95 if n >= len(values)), default=10)
    half = _T_95[fallback] * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(float(values.mean()), half, tuple(values.tolist()))


def capacity_per_s(fleet: Fleet, requests: Requests) -> float:
    """Requests per second with every worker always busy: an upper bound on any stable rate.

    Prefill: batches cut as the simulator cuts them when the queue never empties. Decode: the best batch
    that KV memory and the batch limit allow, all at the mean context (a request is seen as often as it has
    steps, so means are weighted by output length)."""
    if isinstance(fleet, ColocatedFleet):
        prefill = prefill_capacity(
            fleet.table.prefill, requests.num_prompt_tokens, requests.num_cached_tokens, fleet.batch_tokens
        )
        decode = _decode_capacity(fleet.table.alpha, fleet.table.beta, fleet.kv_tokens, requests)
        if (
            fleet.mixed is not None
        ):  # chunks share a step with decodes: only the slower of both binds for sure
            return fleet.num_workers * min(prefill * 1.5, decode)
        return fleet.num_workers / (1 / prefill + 1 / decode)
    return min(phase_capacities(fleet, requests))


def phase_capacities(fleet: SplitFleet, requests: Requests) -> tuple[float, float]:
    prefill = prefill_capacity(
        fleet.prefill.prefill, requests.num_prompt_tokens, requests.num_cached_tokens, fleet.batch_tokens
    )
    decode = _decode_capacity(fleet.decode.alpha, fleet.decode.beta, fleet.decode_kv_tokens, requests)
    return fleet.num_prefill * prefill, fleet.num_decode * decode


def _decode_capacity(alpha: object, beta: object, kv_tokens: int, requests: Requests) -> float:
    alpha_s, beta_s = np.asarray(alpha)[1:], np.asarray(beta)[1:]
    steps = np.maximum(0, requests.num_output_tokens - 1).astype(float)
    total = float(steps.sum())
    if total == 0:
        return math.inf
    footprint = float((steps * (requests.num_prompt_tokens + requests.num_output_tokens)).sum()) / total
    context = (
        float((steps * (requests.num_prompt_tokens + (requests.num_output_tokens + 1) / 2)).sum()) / total
    )
    batch = np.arange(1, len(alpha_s) + 1)
    step_s = alpha_s + beta_s * batch * context
    allowed = np.maximum(1, min(kv_tokens / footprint, len(alpha_s)))
    rate = np.where(batch <= max(1, allowed), batch / step_s, 0.0).max()
    return float(rate) * len(requests) / total


def rate_kept(
    keeps: Callable[[float], bool],
    upper: float,
    *,
    tolerance: float = TOLERANCE,
    hint: float | None = None,
    kept: float = 0.0,
) -> float:
    """The highest rate in (0, upper] below which every scanned rate keeps; 0 when none does.

    `hint`: a rate near the answer, believed only after both of its sides were tried. `kept`: a rate that
    is known to keep; the scan goes up from there."""
    if not upper > 0:
        return 0.0
    low, high = 0.0, upper
    if hint is not None and 0 < hint < upper:
        below, above = hint * (1 - AROUND), min(upper, hint * (1 + AROUND))
        if keeps(below):
            low, kept = below, max(kept, below)
            if above < upper and not keeps(above):
                high = above
                return _bisected(keeps, low, high, tolerance)
    if kept:
        low = kept
        scan = [kept * factor for factor in SCAN_UP]
    else:
        scan = [upper * share for share in SCAN]
    for rate in scan:
        if rate >= upper:
            break
        if not keeps(rate):
            high = rate
            break
        low = rate
    if low == 0.0:
        low = FLOOR * upper
        if high <= low or not keeps(low):
            return 0.0
    return _bisected(keeps, low, high, tolerance)


def _bisected(keeps: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    while high - low > tolerance * high:
        middle = (low + high) / 2
        if keeps(middle):
            low = middle
        else:
            high = middle
    return low


def goodput_per_s(
    fleet: Fleet,
    requests: Requests,
    slo: Slo,
    *,
    tolerance: float = TOLERANCE,
    hint: float | None = None,
    kept: float = 0.0,
) -> float:
    """Requests per second of the whole fleet."""
    return rate_kept(
        lambda rate: keeps_slo(fleet, requests, slo, rate),
        capacity_per_s(fleet, requests),
        tolerance=tolerance,
        hint=hint,
        kept=kept,
    )


def keeps_slo(fleet: Fleet, requests: Requests, slo: Slo, rate_per_s: float) -> bool:
    trial = trial_at(requests, slo, rate_per_s)
    stop = StopEarly(
        slo.ttft_limit_s, slo.tpot_limit_s, trial.first_counted, trial.end_counted,
        int((1 - slo.attainment) * trial.num_counted) + 1,
    )  # fmt: skip
    done = simulate(fleet, trial.requests, rate_per_s, stop=stop)
    return attained(done, trial.counted, slo).both >= slo.attainment
