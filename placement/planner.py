"""The whole answer to one question: the ranked plans, the baseline beside them, the verdict and why."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from placement.evaluation import Bench, Candidate, Problem
from placement.explain import (
    Binding,
    NearestSlo,
    WhatIf,
    binding_constraint,
    nearest_feasible_slo,
    what_ifs,
)
from placement.paper_modes import high_affinity, low_affinity
from placement.plans import ColocatedPlan, Plan
from placement.search import Ranking, colocated_search, joint_search

Mode = Literal["joint", "high-affinity", "low-affinity"]


class ModelDoesNotFit(ValueError):
    """No split of the model fits into the hardware; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class Answer:
    problem: Problem
    mode: Mode
    split: Ranking
    colocated: Ranking
    best: Candidate | None
    """The recommendation; None: nothing keeps the SLO (and the rate, if there is one)."""
    verdict: str
    binding: Binding | None
    what_ifs: list[WhatIf]
    pareto: list[Candidate]
    nearest: NearestSlo | None
    """Only without a best one."""
    most_per_s: float | None
    """Only without a best one, when the SLO can be kept but the rate cannot: the highest that can."""
    search_s: float
    search_cpu_s: float

    @property
    def gain(self) -> tuple[float, float, float] | None:
        """Goodput per GPU of the best split plan over the best colocated one, with interval."""
        split, colocated = self.split.best, self.colocated.best
        if split is None or colocated is None or colocated.per_gpu.mean <= 0:
            return None
        ratio = split.per_gpu.mean / colocated.per_gpu.mean
        error = ratio * math.hypot(
            split.per_gpu.half_width / split.per_gpu.mean,
            colocated.per_gpu.half_width / colocated.per_gpu.mean,
        )
        return ratio, ratio - error, ratio + error


def answer(problem: Problem, mode: Mode = "joint") -> Answer:
    """Raises ModelDoesNotFit."""
    bench = Bench(problem)
    if not bench.prefill_splits or not bench.decode_splits:
        raise ModelDoesNotFit(_why_nothing_fits(problem, bench))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    if mode == "joint":
        split = joint_search(bench)
    elif mode == "high-affinity":
        split = high_affinity(bench)
    else:
        split = low_affinity(bench)
    colocated = colocated_search(bench)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    best, verdict = _verdict(problem, split, colocated)
    binding, changes = None, []
    nearest, most = None, None
    if best is not None:
        fleet = bench.fleet(best.plan)
        if fleet is not None:
            binding = binding_constraint(bench, fleet, best.goodput.mean)
            # Draws differ by a few per cent and the knee is steep: at their mean some are beyond it.
            changes = what_ifs(bench, fleet, problem.rate_per_s or min(best.goodput.samples))
    else:
        most, nearest = _what_instead(problem, bench)
    pareto = pareto_set([*split.candidates, *colocated.candidates])
    return Answer(
        problem, mode, split, colocated, best, verdict, binding, changes, pareto, nearest, most, wall_s, cpu_s
    )


def _simplest(ranking: Ranking) -> Candidate | None:
    """Of those that are equal to the best: without pipelines, then on the fewest GPUs."""
    equal = [c for c, is_equal in zip(ranking.candidates, ranking.is_equal, strict=True) if is_equal]
    return min(equal, key=lambda c: (num_stages(c.plan) > 2, c.plan.num_gpus, -c.goodput.mean), default=None)


def num_stages(plan: Plan) -> int:
    """Of both kinds of workers together; 2 is no pipeline at all."""
    if isinstance(plan, ColocatedPlan):
        return 2 * plan.split.pipeline
    return plan.prefill.pipeline + plan.decode.pipeline


def _verdict(problem: Problem, split: Ranking, colocated: Ranking) -> tuple[Candidate | None, str]:
    of_split, of_colocated = _simplest(split), _simplest(colocated)
    if of_split is None and of_colocated is None:
        return None, "no placement keeps the SLO" + (
            f" at {problem.rate_per_s:g} requests/s" if problem.rate_per_s else ""
        )
    if of_split is None:
        assert of_colocated is not None
        return of_colocated, "do not disaggregate: no split placement keeps the SLO, a colocated one does"
    if of_colocated is None:
        return of_split, "disaggregate: no colocated placement keeps the SLO"
    if problem.rate_per_s is not None:
        a, b = of_split.plan.num_gpus, of_colocated.plan.num_gpus
        if a < b:
            return of_split, f"disaggregate: {a} GPUs instead of {b} for {problem.rate_per_s:g} requests/s"
        if b < a:
            return of_colocated, f"do not disaggregate: {b} GPUs instead of {a} colocated"
        return of_colocated, f"do not disaggregate: both need {a} GPUs, and colocated is simpler"
    ratio = of_split.per_gpu.mean / of_colocated.per_gpu.mean
    if of_split.per_gpu.low > of_colocated.per_gpu.high:
        return of_split, f"disaggregate: {ratio:.2f}x the goodput per GPU of the best colocated placement"
    if of_split.per_gpu.high < of_colocated.per_gpu.low:
        return of_colocated, f"do not disaggregate: colocated gives {1 / ratio:.2f}x the goodput per GPU"
    return of_colocated, f"do not disaggregate: {ratio:.2f}x is within the error, and colocated is simpler"


def _what_instead(problem: Problem, bench: Bench) -> tuple[float | None, NearestSlo | None]:
    if problem.rate_per_s is not None:
        free = Problem(
            cluster=problem.cluster, prefill_source=problem.prefill_source,
            decode_source=problem.decode_source, request_sets=problem.request_sets, slo=problem.slo,
            tensor_sizes=problem.tensor_sizes, max_pipeline=problem.max_pipeline,
        )  # fmt: skip
        open_bench = Bench(free)
        found = [*joint_search(open_bench).candidates, *colocated_search(open_bench).candidates]
        if found:
            return max(c.goodput.mean for c in found), None
    return None, nearest_feasible_slo(bench)


def pareto_set(candidates: list[Candidate]) -> list[Candidate]:
    """More requests per second only for more GPUs."""
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.plan.num_gpus, -c.goodput.mean)):
        if not found or candidate.goodput.mean > found[-1].goodput.mean * 1.005:
            found.append(candidate)
    return found


def _why_nothing_fits(problem: Problem, bench: Bench) -> str:
    pool = problem.cluster.prefill if not bench.prefill_splits else problem.cluster.decode
    source = problem.prefill_source if not bench.prefill_splits else problem.decode_source
    memory = pool.gpu.memory_bytes * pool.largest_node / 2**30
    return (
        f"{source.name}: no split fits {pool}; tensor parallelism up to {pool.largest_node} and up to "
        f"{problem.max_pipeline} stages were tried, one node has {memory:,.0f} GiB"
    )
