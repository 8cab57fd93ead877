"""The default search: which split per phase and how many workers, pooled, under a GPU budget.

1. Each phase alone, per split and pool size 1, 2, 4, …: the rate within its own SLO. Sizes between are
   interpolated. The smaller of both phases bounds a plan from above, but for a few percent of slack.
2. All pairs of splits and counts by that bound. Best bound first, a plan is simulated jointly at the rate
   the best one so far would need it to keep; only plans that keep it are searched for their goodput.
3. The best ones again on independent request sets, which gives the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cluster import Split
from placement.evaluation import Bench, Candidate, equal_to_best, in_parallel, ranked
from placement.goodput import Estimate, capacity_per_s
from placement.plans import ColocatedPlan, Plan, SplitPlan
from placement.workers import WorkerKind

SLACK = 1.1
"""A phase alone is not quite a bound: it is known to 4 %, and prefill hands decode a smoother stream than
Poisson."""
NEAR = 0.97
"""Plans within so much of the best are searched too: the interval may not tell them apart."""
NUM_FINALISTS = 4
CHUNKS = (256, 512, 2048)
"""Tokens per step of chunked colocated workers: a tight TPOT wants short steps, throughput long ones."""
MAX_TRIED = 400

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates of one kind (split or colocated), best first."""

    candidates: list[Candidate]
    is_equal: list[bool]
    num_plans: int
    """How many were considered."""
    num_tried: int
    """How many of these were simulated jointly."""

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None


@dataclass(frozen=True, slots=True)
class Screened:
    """What one phase gives alone."""

    kind: WorkerKind
    rates: Floats
    """By number of workers, from 1."""


def joint_search(bench: Bench, *, num_finalists: int = NUM_FINALISTS) -> Ranking:
    prefill = screen(bench, is_prefill=True)
    decode = screen(bench, is_prefill=False)
    plans = list(_bounded_plans(bench, prefill, decode))
    return _tried(bench, plans, num_finalists)


def colocated_search(bench: Bench, *, num_finalists: int = 3) -> Ranking:
    """Same machinery, same requests, on the prefill pool of the cluster (the only one if it is shared)."""
    problem = bench.problem
    requests = problem.requests
    plans: list[tuple[float, Plan]] = []
    budget = problem.cluster.prefill.num_gpus
    for split in bench.prefill_splits:
        most = budget // split.num_gpus
        counts = range(1, most + 1) if problem.rate_per_s else sorted({1, most // 2, most} - {0})
        for chunk in (None, *CHUNKS):
            one = bench.fleet(ColocatedPlan(split, 1, chunk))
            if one is None:
                continue
            capacity = capacity_per_s(one, requests)
            plans += [(capacity * count, ColocatedPlan(split, count, chunk)) for count in counts]
    return _tried(bench, plans, num_finalists)


def screen(bench: Bench, *, is_prefill: bool) -> list[Screened]:
    cluster = bench.problem.cluster
    pool = cluster.prefill if is_prefill else cluster.decode
    budget = pool.num_gpus - (1 if cluster.is_shared else 0)
    requests = bench.problem.requests
    splits = [
        split
        for split in (bench.prefill_splits if is_prefill else bench.decode_splits)
        if split.num_gpus <= budget
    ]

    def screened(split: Split) -> Screened:
        kind = bench.prefill_kind(split) if is_prefill else bench.decode_kind(split)
        assert kind is not None
        alone = bench.prefill_alone if is_prefill else bench.decode_alone
        sizes = _pool_sizes(budget // split.num_gpus)
        per_worker: list[float] = []
        for count in sizes:
            # A larger pool gives each worker no less: the search starts where the smaller one ended.
            kept = 0.98 * count * per_worker[-1] if per_worker else 0.0
            per_worker.append(alone(kind, count, requests, kept=kept) / count)
        counts = np.arange(1, sizes[-1] + 1)
        return Screened(kind, counts * np.interp(np.log(counts), np.log(sizes), per_worker))

    return in_parallel(screened, splits)


def _pool_sizes(most: int) -> list[int]:
    return sorted({1, *(2**k for k in range(1, most.bit_length()) if 2**k < most), most})


def _bounded_plans(
    bench: Bench, prefill: list[Screened], decode: list[Screened]
) -> Iterator[tuple[float, Plan]]:
    """(upper bound of its rate, plan), for plans within the budget that could serve the rate at all."""
    problem = bench.problem
    shared = problem.cluster.num_gpus if problem.cluster.is_shared else math.inf
    floor = problem.rate_per_s or 0.0
    for p in prefill:
        for d in decode:
            bound = SLACK * np.minimum(p.rates[:, None], d.rates[None, :])
            gpus = (
                np.arange(1, len(p.rates) + 1)[:, None] * p.kind.num_gpus
                + np.arange(1, len(d.rates) + 1)[None, :] * d.kind.num_gpus
            )
            for i, j in np.argwhere((gpus <= shared) & (bound >= floor) & (bound > 0)):
                yield float(bound[i, j]), SplitPlan(p.kind.split, int(i) + 1, d.kind.split, int(j) + 1)


def _tried(bench: Bench, plans: list[tuple[float, Plan]], num_finalists: int) -> Ranking:
    if bench.problem.rate_per_s is None:
        found, num_tried = _most_per_gpu(bench, plans, num_finalists)
    else:
        found, num_tried = _fewest_gpus(bench, plans, num_finalists, bench.problem.rate_per_s)
    is_fixed = bench.problem.rate_per_s is not None
    short = found[:num_finalists]

    def final(item: tuple[Plan, float]) -> Candidate:
        plan, first = item
        fleet = bench.fleet(plan)
        assert fleet is not None
        return Candidate(plan, bench.estimate(fleet, first), bench.charged(plan))

    candidates = in_parallel(final, short)
    candidates += [
        Candidate(plan, _unsure(first, candidates), bench.charged(plan))
        for plan, first in found[num_finalists:]
    ]
    if is_fixed:
        rate = bench.problem.rate_per_s or 0.0
        surely = [c for c in candidates if c.goodput.mean >= rate]
        candidates = surely or candidates
    ranking = ranked(candidates, is_rate_fixed=is_fixed)
    return Ranking(ranking, equal_to_best(ranking, is_rate_fixed=is_fixed), len(plans), num_tried)


def _unsure(value: float, finalists: list[Candidate]) -> Estimate:
    """One request set only: the relative interval of the finalists stands in."""
    widths = [c.goodput.half_width / c.goodput.mean for c in finalists if c.goodput.mean > 0]
    return Estimate(value, value * max(widths, default=0.1), (value,))


def _most_per_gpu(
    bench: Bench, plans: list[tuple[float, Plan]], num_finalists: int
) -> tuple[list[tuple[Plan, float]], int]:
    """The best plans with their goodput on the first request set, best first."""
    plans = sorted(plans, key=lambda item: (-item[0] / item[1].num_gpus, item[1].num_gpus))
    best = 0.0
    found: list[tuple[float, Plan, float]] = []
    num_tried = 0
    batch = 2
    for start in range(0, min(len(plans), MAX_TRIED), batch):
        some = plans[start : start + batch]
        if some[0][0] / some[0][1].num_gpus < NEAR * best:
            break

        def tried(item: tuple[float, Plan], best: float = best) -> tuple[float, Plan, float] | None:
            bound, plan = item
            charged = bench.charged(plan)
            if not math.isfinite(charged) or bound < NEAR * best * charged:
                return None
            fleet = bench.fleet(plan)
            needed = NEAR * best * charged
            if fleet is None or (best and not bench.keeps(fleet, needed)):
                return None
            goodput = bench.goodput(fleet, kept=needed)
            return goodput / charged, plan, goodput

        results = in_parallel(tried, some)
        num_tried += len(some)
        for result in results:
            if result is not None and result[2] > 0:
                found.append(result)
                best = max(best, result[0])
    found.sort(key=lambda item: -item[0])
    return [(plan, goodput) for _, plan, goodput in found], num_tried


def _fewest_gpus(
    bench: Bench, plans: list[tuple[float, Plan]], num_finalists: int, rate_per_s: float
) -> tuple[list[tuple[Plan, float]], int]:
    """Plans that keep the rate, fewest GPUs first; as soon as one number of GPUs gives some, it and the
    next are enough."""
    plans = sorted(plans, key=lambda item: (item[1].num_gpus, -item[0]))
    found: list[tuple[Plan, float]] = []
    enough_gpus = math.inf
    num_tried = 0
    for bound, plan in plans:
        if plan.num_gpus > enough_gpus or num_tried >= MAX_TRIED:
            break
        if bound < rate_per_s:
            continue
        fleet = bench.fleet(plan)
        num_tried += 1
        if fleet is None or not bench.keeps(fleet, rate_per_s):
            continue
        found.append((plan, bench.goodput(fleet, kept=rate_per_s)))
        if len(found) == 1:
            enough_gpus = plan.num_gpus * 1.25 + 1
    found.sort(key=lambda item: (item[0].num_gpus, -item[1]))
    return found, num_tried
