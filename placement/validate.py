"""Predicted beside observed: the same requests at the same times, in the simulator and on a running fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from baton.step_time import prefill_pairs
from placement.kernels.steps import prefill_step_s
from placement.live import Observed, play, solo_times_s
from placement.requests import Requests
from placement.simulator import Fleet, SplitFleet, Timings, simulate
from placement.slo import Attainment, Slo, attained

KNEE_STEEPNESS = 0.10
"""Attainment that changes by more between 0.85 and 1.15 times a rate makes it a rate at the knee: there a few
per cent of step time decide, and nobody's prediction of attainment is worth much."""

AWAY_POINTS = 0.05
"""Agreement asked for away from the knee."""

RATE_FACTORS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5)
"""Of the highest rate that keeps the SLO in the simulator, where no rates are given."""


@dataclass(frozen=True, slots=True)
class Row:
    rate_per_s: float
    predicted: Attainment
    observed: Attainment
    predicted_ttft_s: tuple[float, float]
    """Median and 90th percentile."""
    observed_ttft_s: tuple[float, float]
    predicted_tpot_s: tuple[float, float]
    observed_tpot_s: tuple[float, float]
    is_at_knee: bool
    num_failed: int
    late_s: float

    @property
    def difference(self) -> float:
        return self.predicted.both - self.observed.both

    @property
    def agrees(self) -> bool | None:
        """None at the knee, where agreement is not asked for."""
        return None if self.is_at_knee else abs(self.difference) <= AWAY_POINTS


@dataclass(frozen=True, slots=True)
class Validation:
    rows: list[Row]
    overhead_s: float
    """Of a request alone in the fleet beside its prefill step: the doors, the coordinator, the client. Added
    to every predicted TTFT."""
    handoff_s: float
    """Of a request alone between its first two tokens, beside the transfer and the decode step: notices and
    handshakes. Added to every predicted transfer."""
    first_failure: str | None


def counted(requests: Requests) -> slice:
    """All but the first tenth, which met an empty fleet."""
    return slice(len(requests) // 10, None)


def shifted(timings: Timings, overhead_s: float) -> Timings:
    return Timings(timings.ttft_s + overhead_s, timings.tpot_s)


def highest_rate(fleet: Fleet, requests: Requests, slo: Slo, overhead_s: float) -> float:
    """At which the SLO is kept in the simulator, to 2 %; 0.0 when a request alone misses it too often."""

    def keeps(rate: float) -> bool:
        return attained(
            shifted(simulate(fleet, requests, rate), overhead_s), counted(requests), slo
        ).both >= (slo.attainment)

    rate = 0.01
    if not keeps(rate):
        return 0.0
    while keeps(rate * 2) and rate < 1e6:
        rate *= 2
    low, high = rate, rate * 2
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def is_at_knee(fleet: Fleet, requests: Requests, slo: Slo, rate_per_s: float, overhead_s: float) -> bool:
    around = [
        attained(
            shifted(simulate(fleet, requests, rate_per_s * factor), overhead_s), counted(requests), slo
        ).both
        for factor in (0.85, 1.0, 1.15)
    ]
    return max(around) - min(around) > KNEE_STEEPNESS


def measure_overheads_s(address: str, fleet: Fleet, num_prompt_tokens: int) -> tuple[float, float]:
    """`overhead_s` and `handoff_s` of a Validation."""
    found = asyncio.run(solo_times_s(address, num_prompt_tokens))
    to_first_s, to_second_s = map(median, zip(*found, strict=True))
    handoff_s = 0.0
    if isinstance(fleet, SplitFleet):
        handoff_s = to_second_s - _handoff_s(fleet, num_prompt_tokens)
    return max(0.0, to_first_s - _prefill_s(fleet, num_prompt_tokens)), max(0.0, handoff_s)


def with_slower_links(fleet: Fleet, more_s: float) -> Fleet:
    """Each transfer takes so much longer; colocated workers have none."""
    if not isinstance(fleet, SplitFleet):
        return fleet
    return replace(fleet, links=replace(fleet.links, base_s=fleet.links.base_s + more_s))


def validate(
    address: str,
    fleet: Fleet,
    requests: Requests,
    knee_requests: Requests,
    slo: Slo,
    *,
    rates_per_s: Sequence[float] | None,
    say: Callable[[str], None],
) -> Validation:
    """`knee_requests`: a longer set of the same workload, for rates and knees. Raises ServingError when the
    fleet cannot be reached, ValueError when no rate keeps the SLO and none is given."""
    overhead_s, handoff_s = measure_overheads_s(address, fleet, int(np.median(requests.num_prompt_tokens)))
    say(
        f"a request alone takes {overhead_s * 1e3:.1f} ms beside its prefill step, and "
        f"{handoff_s * 1e3:.1f} ms beside the transfer and its first decode step"
    )
    fleet = with_slower_links(fleet, handoff_s)
    if rates_per_s is None:
        knee = highest_rate(fleet, knee_requests, slo, overhead_s)
        if not knee:
            raise ValueError(f"no rate keeps {slo} in the simulator; name the rates with --rates")
        rates_per_s = [round(knee * factor, 3) for factor in RATE_FACTORS]
        say(f"the simulator keeps the SLO up to {knee:.2f} requests/s")
    rows, first_failure = [], None
    for rate in rates_per_s:
        predicted = shifted(simulate(fleet, requests, rate), overhead_s)
        at_knee = is_at_knee(fleet, knee_requests, slo, rate, overhead_s)
        observed = asyncio.run(play(address, requests, rate))
        first_failure = first_failure or observed.first_failure
        rows.append(_row(rate, requests, slo, predicted, observed, at_knee))
        say(f"{rate:g}/s: predicted {rows[-1].predicted.both:.1%}, observed {rows[-1].observed.both:.1%}")
    return Validation(rows, overhead_s, handoff_s, first_failure)


def table(found: Validation, slo: Slo) -> str:
    header = f"{'rate/s':>8}  {'predicted':>9}  {'observed':>8}  {'points':>6}   "
    header += f"{'TTFT p50/p90 ms, predicted':>26}  {'observed':>15}   {'TPOT p50/p90 ms, predicted':>26}  "
    header += f"{'observed':>15}"
    lines = [f"share of requests with {str(slo).partition(' for ')[0]}", header]
    for row in found.rows:
        verdict = {None: "at the knee", True: "", False: "off"}[row.agrees]
        if row.num_failed:
            verdict += f" {row.num_failed} failed"
        if row.late_s > 0.05:
            verdict += f" client {row.late_s * 1e3:.0f} ms late"
        ttft = f"{_pair(row.predicted_ttft_s):>26}  {_pair(row.observed_ttft_s):>15}"
        tpot = f"{_pair(row.predicted_tpot_s):>26}  {_pair(row.observed_tpot_s):>15}"
        share = f"{row.predicted.both:>9.1%}  {row.observed.both:>8.1%}  {row.difference * 100:>+6.1f}"
        lines.append(f"{row.rate_per_s:>8.3g}  {share}   {ttft}   {tpot}  {verdict}".rstrip())
    lines.append(
        f"{found.overhead_s * 1e3:.1f} ms of a request alone beside its prefill step are in each TTFT, "
        f"{found.handoff_s * 1e3:.1f} ms beside its transfer in each hand-off"
    )
    if found.first_failure is not None:
        lines.append(f"first failure: {found.first_failure}")
    return "\n".join(lines)


def as_json(found: Validation) -> dict[str, Any]:
    return {
        "overhead_s": found.overhead_s,
        "handoff_s": found.handoff_s,
        "first_failure": found.first_failure,
        "rows": [
            {
                "rate_per_s": row.rate_per_s,
                "predicted": row.predicted.both,
                "observed": row.observed.both,
                "difference": row.difference,
                "at_knee": row.is_at_knee,
                "predicted_ttft_s": row.predicted_ttft_s,
                "observed_ttft_s": row.observed_ttft_s,
                "predicted_tpot_s": row.predicted_tpot_s,
                "observed_tpot_s": row.observed_tpot_s,
                "failed": row.num_failed,
                "client_late_s": row.late_s,
            }
            for row in found.rows
        ],
    }


def _row(
    rate: float, requests: Requests, slo: Slo, predicted: Timings, observed: Observed, at_knee: bool
) -> Row:
    rows = counted(requests)
    return Row(
        rate_per_s=rate,
        predicted=attained(predicted, rows, slo),
        observed=attained(observed.timings, rows, slo),
        predicted_ttft_s=_quantiles(predicted.ttft_s[rows]),
        observed_ttft_s=_quantiles(observed.timings.ttft_s[rows]),
        predicted_tpot_s=_quantiles(predicted.tpot_s[rows]),
        observed_tpot_s=_quantiles(observed.timings.tpot_s[rows]),
        is_at_knee=at_knee,
        num_failed=observed.num_failed,
        late_s=observed.late_s,
    )


def _quantiles(values: Any) -> tuple[float, float]:
    ordered = np.sort(values)
    return float(ordered[len(ordered) // 2]), float(ordered[int(0.9 * (len(ordered) - 1))])


def _pair(values: tuple[float, float]) -> str:
    return " / ".join(f"{value * 1e3:.0f}" if value < 1e3 else "-" for value in values)


def _prefill_s(fleet: Fleet, num_prompt_tokens: int) -> float:
    steps = fleet.prefill if isinstance(fleet, SplitFleet) else fleet.table
    return float(prefill_step_s(steps.prefill, float(num_prompt_tokens), prefill_pairs(num_prompt_tokens)))


def _handoff_s(fleet: SplitFleet, num_prompt_tokens: int) -> float:
    """From the first token to the second of a request alone: transfer, and a step of one sequence."""
    transfer_s = float(fleet.links.base_s[0] + fleet.links.token_s[0] * num_prompt_tokens)
    return transfer_s + float(fleet.decode.alpha[1] + fleet.decode.beta[1] * num_prompt_tokens)
