"""Why a plan gives no more, and what could be kept instead of an SLO that nobody keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from placement.evaluation import Bench
from placement.plans import ColocatedPlan, Plan, SplitPlan
from placement.requests import Requests
from placement.simulator import ColocatedFleet, Fleet, Timings, fits, simulate
from placement.slo import Slo

BEYOND = 1.08
"""Of the goodput: just past the knee, where it shows what breaks first."""
IDLE_SHARE = 0.001
"""Of capacity: every request finds an empty fleet."""


@dataclass(frozen=True, slots=True)
class Binding:
    """What most of the requests that just miss the SLO die of."""

    name: str
    """prefill-too-long, queue, decode-step, kv-memory or link."""
    sentence: str
    share: float
    """Of the misses."""


def binding_constraint(bench: Bench, fleet: Fleet, goodput_per_s: float) -> Binding:
    slo = bench.problem.slo
    done, trial, _ = bench.at_rate(fleet, BEYOND * goodput_per_s)
    requests = trial.requests
    alone = simulate(fleet, requests, goodput_per_s * IDLE_SHARE)
    counted = np.zeros(len(requests), bool)
    counted[trial.counted] = True
    causes = _causes(done, alone, requests, slo, is_colocated=isinstance(fleet, ColocatedFleet))
    holds = fits(fleet, requests)
    causes["kv-memory"] = (causes["kv-memory"] & holds) | ~holds
    if _is_held_back(done, counted):
        # Prompts that are ready fill the prefill workers' memory: the queue is not of their making.
        causes["kv-memory"] |= causes["queue"]
        causes["queue"] = np.zeros(len(requests), bool)
    sizes = {name: int((mask & counted).sum()) for name, mask in causes.items()}
    total = sum(sizes.values())
    if not total:
        return Binding("capacity", "more load would not be stable: the workers are always busy", 1.0)
    name = max(sizes, key=lambda key: sizes[key])
    return Binding(name, _sentence(name, done, alone, slo, causes[name] & counted), sizes[name] / total)


def _is_held_back(done: Timings, counted: np.ndarray) -> bool:
    room = done.parts_s.get("room")
    if room is None or done.busy_share.get("prefill", 1.0) > 0.9:
        return False
    return float(np.median(room[counted])) > float(np.median(done.parts_s["prefill"][counted]))


def _causes(
    done: Timings, alone: Timings, requests: Requests, slo: Slo, *, is_colocated: bool
) -> dict[str, np.ndarray]:
    late = ~(done.ttft_s <= slo.ttft_limit_s)
    too_long = late & ~(alone.ttft_s <= slo.ttft_limit_s)
    slow = ~late & ~(done.tpot_s <= slo.tpot_limit_s)
    steps = np.maximum(1, requests.num_output_tokens - 1)
    nothing = np.zeros(len(late), bool)
    room = done.parts_s.get("room", np.zeros(len(late)))
    link = done.parts_s.get("link", np.zeros(len(late)))
    # Which of the waits is it without which the request would have been in time?
    over_s = (done.tpot_s - slo.tpot_limit_s) * steps
    by_room = nothing if is_colocated else slow & (room >= np.maximum(over_s, link))
    by_link = nothing if is_colocated else slow & ~by_room & (link >= over_s)
    return {
        "prefill-too-long": too_long,
        "queue": late & ~too_long,
        "kv-memory": by_room,
        "link": by_link,
        "decode-step": slow & ~by_room & ~by_link,
    }


def _sentence(name: str, done: Timings, alone: Timings, slo: Slo, mask: np.ndarray) -> str:
    if name == "prefill-too-long":
        longest = float(np.median(alone.ttft_s[mask]))
        return (
            f"single prompts are too long: the median of those that miss needs {longest * 1e3:,.0f} ms on an "
            f"idle worker, TTFT allows {slo.ttft_limit_s * 1e3:,.0f} ms; more workers would not help, more "
            "tensor parallelism would"
        )
    if name == "queue":
        queue = float(np.median(done.parts_s["queue"][mask]))
        return (
            f"the prefill queue: requests that miss the TTFT wait {queue * 1e3:,.0f} ms (median) before they "
            "start; more prefill workers would help"
        )
    if name == "kv-memory":
        return (
            "KV memory on the decode side: prompts are ready and wait for room; more decode workers, or ones "
            "with more memory, would help"
        )
    if name == "link":
        link = float(np.median(done.parts_s["link"][mask]))
        return (
            f"the link: KV of those that miss moves for {link * 1e3:,.0f} ms (median); keep pairs in a node"
        )
    step = float(np.median(done.tpot_s[mask]))
    idle = float(np.median(alone.tpot_s[mask & np.isfinite(alone.tpot_s)])) if mask.any() else math.nan
    return (
        f"the decode step: tokens of those that miss come every {step * 1e3:,.1f} ms (median; "
        f"{idle * 1e3:,.1f} ms alone), TPOT allows {slo.tpot_limit_s * 1e3:,.0f} ms; more decode workers or "
        "tensor parallelism would help"
    )


@dataclass(frozen=True, slots=True)
class NearestSlo:
    """What an idle fleet of the best split keeps for the wanted share of requests."""

    plan: Plan
    scaled: Slo
    """Both limits relaxed by the same factor."""
    factor: float
    needed_ttft_s: float | None
    """With the TPOT as asked; None: that does not help."""
    needed_tpot_s: float | None


def nearest_feasible_slo(bench: Bench) -> NearestSlo | None:
    """Over one worker per phase of every split, each request alone: queueing only adds to this. None: not
    even the lengths fit into any worker."""
    slo, requests = bench.problem.slo, bench.problem.requests.first(2000)
    best: NearestSlo | None = None
    plans: list[Plan] = [SplitPlan(p, 1, d, 1) for p in bench.prefill_splits for d in bench.decode_splits]
    plans += [ColocatedPlan(split, 1, None) for split in bench.prefill_splits]
    for plan in plans:
        fleet = bench.fleet(plan)
        if fleet is None:
            continue
        alone = simulate(fleet, requests, 1e-6)
        ttft, tpot = alone.ttft_s / slo.ttft_limit_s, alone.tpot_s / slo.tpot_limit_s
        factor = float(np.quantile(np.maximum(ttft, tpot), slo.attainment, method="higher"))
        if not math.isfinite(factor) or (best is not None and factor >= best.factor):
            continue
        best = NearestSlo(
            plan,
            slo.scaled(factor * 1.001),
            factor,
            _quantile_among(alone.ttft_s, tpot <= 1, slo),
            _quantile_among(alone.tpot_s, ttft <= 1, slo),
        )
    return best


def _quantile_among(values: np.ndarray, others_keep: np.ndarray, slo: Slo) -> float | None:
    """The limit on `values` with which the wanted share of all requests keeps both."""
    kept = np.sort(values[others_keep & np.isfinite(values)])
    needed = math.ceil(slo.attainment * len(values))
    return float(kept[needed - 1]) if len(kept) >= needed else None


@dataclass(frozen=True, slots=True)
class WhatIf:
    change: str
    rate_per_s: float
    attainment: float
    ttft: float
    tpot: float
    prefill_busy: float
    decode_busy: float


def what_ifs(bench: Bench, fleet: Fleet, rate_per_s: float) -> list[WhatIf]:
    """The plan at 20 % less and more load."""
    found = []
    for change, factor in (("-20 %", 0.8), ("as planned", 1.0), ("+20 %", 1.2)):
        done, _, share = bench.at_rate(fleet, rate_per_s * factor)
        busy = done.busy_share
        found.append(
            WhatIf(
                change,
                rate_per_s * factor,
                share.both,
                share.ttft,
                share.tpot,
                busy.get("prefill", busy.get("colocated", 0.0)),
                busy.get("decode", busy.get("colocated", 0.0)),
            )
        )
    return found


def attainment_curve(bench: Bench, fleet: Fleet, rates_per_s: np.ndarray) -> list[float]:
    return [bench.at_rate(fleet, float(rate))[2].both for rate in rates_per_s]
