"""DistServe's two algorithms (OSDI'24, section 4), as stated there, beside our own search.

high-affinity (Algorithm 1): any two GPUs are as good as neighbours. Each phase is simulated by itself, one
    worker, and the split with the best goodput per GPU is taken; counts are ceil(rate / goodput).
low-affinity (Algorithm 2): KV must stay inside nodes. Both phases have the same number of inter-node
    stages, and a node holds one segment of each: (TP, PP inside the node) for prefill and for decode. Such a
    unit is simulated as a whole and replicated.

The paper's text needs a rate for the counts. Without one, counts balance the phases within the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.cluster import Split
from placement.evaluation import Bench, Candidate, equal_to_best, in_parallel, ranked
from placement.plans import Plan, Seats, SplitPlan
from placement.search import NUM_FINALISTS, Ranking


@dataclass(frozen=True, slots=True)
class Counts:
    num_prefill: int
    num_decode: int
    rate_per_s: float
    num_gpus: int

    @property
    def per_gpu(self) -> float:
        return self.rate_per_s / self.num_gpus


def counts_for_rate(
    rate_per_s: float, prefill_per_s: float, decode_per_s: float, prefill_gpus: int = 1, decode_gpus: int = 1
) -> Counts:
    """Algorithm 1's last step."""
    n, m = math.ceil(rate_per_s / prefill_per_s), math.ceil(rate_per_s / decode_per_s)
    served = min(n * prefill_per_s, m * decode_per_s)
    return Counts(n, m, served, n * prefill_gpus + m * decode_gpus)


def balanced_counts(
    prefill_per_s: float, decode_per_s: float, *, budget: int, prefill_gpus: int = 1, decode_gpus: int = 1
) -> Counts | None:
    """The counts within `budget` GPUs that give most per GPU used; fewer GPUs decide ties. None: not even
    one worker of each fits."""
    best: Counts | None = None
    for n in range(1, budget // prefill_gpus + 1):
        for m in range(1, (budget - n * prefill_gpus) // decode_gpus + 1):
            served = min(n * prefill_per_s, m * decode_per_s)
            found = Counts(n, m, served, n * prefill_gpus + m * decode_gpus)
            if best is None or (round(found.per_gpu, 9), -found.num_gpus) > (
                round(best.per_gpu, 9), -best.num_gpus,
            ):  # fmt: skip
                best = found
    return best


def high_affinity(bench: Bench) -> Ranking:
    problem = bench.problem
    requests = problem.requests
    prefill_splits, decode_splits = bench.prefill_splits, bench.decode_splits

    def alone(job: tuple[bool, Split]) -> float:
        is_prefill, split = job
        kind = bench.prefill_kind(split) if is_prefill else bench.decode_kind(split)
        assert kind is not None
        return (bench.prefill_alone if is_prefill else bench.decode_alone)(kind, 1, requests)

    jobs = [(True, s) for s in prefill_splits] + [(False, s) for s in decode_splits]
    rates = dict(zip(jobs, in_parallel(alone, jobs), strict=True))
    if not any(rates[True, s] for s in prefill_splits) or not any(rates[False, s] for s in decode_splits):
        return Ranking([], [], len(jobs), len(jobs))
    # The paper takes the best of each phase. On a small cluster these may not fit beside each other, so the
    # pairs are gone through from the best down, prefill first.
    pairs = sorted(
        ((p, d) for p in prefill_splits for d in decode_splits if rates[True, p] and rates[False, d]),
        key=lambda pair: (
            -rates[True, pair[0]] / pair[0].num_gpus,
            -rates[False, pair[1]] / pair[1].num_gpus,
        ),
    )
    found: list[Candidate] = []
    for prefill, decode in pairs:
        of_prefill, of_decode = rates[True, prefill], rates[False, decode]
        counts = _counts(problem.rate_per_s, of_prefill, of_decode, prefill, decode, problem.cluster.num_gpus)
        if counts is None:
            continue
        plan = SplitPlan(prefill, counts.num_prefill, decode, counts.num_decode)
        fleet = bench.fleet(plan)
        if fleet is not None:
            found.append(Candidate(plan, bench.estimate(fleet), bench.charged(plan)))
            break
    return Ranking(found, [True] * len(found), len(jobs), len(jobs) + len(found))


def _counts(
    rate_per_s: float | None,
    prefill_per_s: float,
    decode_per_s: float,
    prefill: Split,
    decode: Split,
    budget: int,
) -> Counts | None:
    if rate_per_s is None:
        return balanced_counts(
            prefill_per_s, decode_per_s, budget=budget, prefill_gpus=prefill.num_gpus,
            decode_gpus=decode.num_gpus,
        )  # fmt: skip
    counts = counts_for_rate(rate_per_s, prefill_per_s, decode_per_s, prefill.num_gpus, decode.num_gpus)
    return counts if counts.num_gpus <= budget else None


def low_affinity(bench: Bench, *, num_finalists: int = NUM_FINALISTS) -> Ranking:
    """Goodput is of one unit; with a rate to serve the unit is replicated and the counts say so."""
    problem = bench.problem
    nodes, per_node = len(problem.cluster.prefill.node_sizes), problem.cluster.prefill.largest_node
    if not problem.cluster.is_shared:
        return Ranking([], [], 0, 0)  # no node holds both phases
    units = [
        (SplitPlan(Split(tp, k * pp), 1, Split(td, k * pd), 1), k)
        for k in range(1, nodes + 1)
        for tp, pp in _segments(bench, per_node)
        for td, pd in _segments(bench, per_node)
        if tp * pp + td * pd <= per_node
    ]
    units = [
        (plan, k) for plan, k in units if bench.prefill_kind(plan.prefill) and bench.decode_kind(plan.decode)
    ]

    def goodput(unit: tuple[SplitPlan, int]) -> float:
        fleet = bench.fleet(unit[0], _aligned(*unit))
        assert fleet is not None
        return bench.goodput(fleet)

    rates = in_parallel(goodput, units)
    order = sorted(
        (index for index in range(len(units)) if rates[index] > 0),
        key=lambda index: -rates[index] / _unit_charged(bench, *units[index]),
    )

    def final(index: int) -> Candidate:
        plan, k = units[index]
        fleet = bench.fleet(plan, _aligned(plan, k))
        assert fleet is not None
        one = bench.estimate(fleet, rates[index])
        copies = 1 if problem.rate_per_s is None else math.ceil(problem.rate_per_s / rates[index])
        whole: Plan = SplitPlan(plan.prefill, copies, plan.decode, copies)
        return Candidate(whole, one.scaled(copies), copies * _unit_charged(bench, plan, k))

    found = in_parallel(final, order[:num_finalists])
    if problem.rate_per_s is not None:
        found = [c for c in found if c.plan.num_gpus <= problem.cluster.num_gpus]
    is_fixed = problem.rate_per_s is not None
    ranking = ranked(found, is_rate_fixed=is_fixed)
    return Ranking(ranking, equal_to_best(ranking, is_rate_fixed=is_fixed), len(units), len(units))


def _segments(bench: Bench, per_node: int) -> list[tuple[int, int]]:
    sizes = bench.problem.tensor_sizes or tuple(2**k for k in range(per_node.bit_length()))
    return [(t, p) for t in sizes for p in range(1, per_node + 1) if t * p <= per_node]


def _aligned(plan: SplitPlan, num_nodes: int) -> Seats:
    """Stage i of both phases in the same node."""
    prefill = tuple(i * num_nodes // plan.prefill.pipeline for i in range(plan.prefill.pipeline))
    decode = tuple(i * num_nodes // plan.decode.pipeline for i in range(plan.decode.pipeline))
    return Seats((prefill,), (decode,))


def _unit_charged(bench: Bench, plan: SplitPlan, num_nodes: int) -> float:
    """Units of `num_nodes` nodes side by side; what is left in the nodes is stranded."""
    sizes = bench.problem.cluster.prefill.node_sizes
    per_node = plan.num_gpus // num_nodes
    groups = [min(sizes[i : i + num_nodes]) for i in range(0, len(sizes) - num_nodes + 1, num_nodes)]
    copies = sum(size // per_node for size in groups)
    return bench.problem.cluster.num_gpus / copies if copies else math.inf
