"""Plans tried on one problem: worker tables are made once, request sets are shared by all plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from placement.cluster import Cluster, NodePool, Split
from placement.goodput import Estimate, capacity_per_s, estimate, goodput_per_s, keeps_slo
from placement.plans import (
    ColocatedPlan,
    Plan,
    Seats,
    charged_gpus,
    colocated_fleet,
    seat,
    split_fleet,
)
from placement.requests import Requests, Trial
from placement.simulator import UNLIMITED, Fleet, Links, SplitFleet, Timings, simulate
from placement.slo import Attainment, Slo, attained, trial_at
from placement.step_table import StepTable
from placement.workers import Source, WorkerKind, all_splits, worker_kind

NUM_THREADS = 2
"""Compiled simulations run without the interpreter's lock."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that a plan depends on."""

    cluster: Cluster
    prefill_source: Source
    decode_source: Source
    request_sets: tuple[Requests, ...]
    """Independent draws of one workload; the first is used to compare, all of them for intervals."""
    slo: Slo
    rate_per_s: float | None = None
    """What must be served; None: whatever the GPUs give."""
    tensor_sizes: tuple[int, ...] | None = None
    max_pipeline: int = 4
    may_span_nodes: bool = False
    """Pipelines over several nodes, which the fleet scripts cannot start; tried anyway if nothing fits
    into one node."""

    @property
    def requests(self) -> Requests:
        return self.request_sets[0]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and what it gives."""

    plan: Plan
    goodput: Estimate
    """Requests per second of the whole fleet."""
    charged_gpus: float
    """Used ones and, where nothing else of the plan fits beside them, stranded ones."""

    @property
    def per_gpu(self) -> Estimate:
        return self.goodput.scaled(1 / self.charged_gpus)


@dataclass
class Bench:
    """Evaluates plans of one problem. Caches; counts what it simulated."""

    problem: Problem
    num_simulated_requests: int = 0
    _prefill: dict[Split, WorkerKind | None] = field(default_factory=dict)
    _decode: dict[Split, WorkerKind | None] = field(default_factory=dict)
    _charged: dict[Plan, float] = field(default_factory=dict)

    # ── worker kinds ─────────────────────────────────────────────────────────────────────────

    def prefill_kind(self, split: Split) -> WorkerKind | None:
        return self._kind(split, self._prefill, self.problem.prefill_source)

    def decode_kind(self, split: Split) -> WorkerKind | None:
        if self.problem.decode_source is self.problem.prefill_source:
            return self.prefill_kind(split)
        return self._kind(split, self._decode, self.problem.decode_source)

    def _kind(self, split: Split, known: dict[Split, WorkerKind | None], source: Source) -> WorkerKind | None:
        if split not in known:
            longest = max(requests.max_prompt_tokens for requests in self.problem.request_sets)
            known[split] = worker_kind(source, split, max_prompt_tokens=longest)
        return known[split]

    @cached_property
    def prefill_splits(self) -> list[Split]:
        return self._splits(self.problem.cluster.prefill, self.prefill_kind)

    @cached_property
    def decode_splits(self) -> list[Split]:
        return self._splits(self.problem.cluster.decode, self.decode_kind)

    def _splits(self, pool: NodePool, kind: Callable[[Split], WorkerKind | None]) -> list[Split]:
        splits = all_splits(
            pool.largest_node, pool.num_gpus, tensor_sizes=self.problem.tensor_sizes,
            max_pipeline=self.problem.max_pipeline,
        )  # fmt: skip
        inside = [s for s in splits if s.num_gpus <= pool.largest_node and kind(s) is not None]
        if inside and not self.problem.may_span_nodes:
            return inside
        return [s for s in splits if kind(s) is not None]

    # ── fleets ───────────────────────────────────────────────────────────────────────────────

    def fleet(self, plan: Plan, seats: Seats | None = None) -> Fleet | None:
        """None: it does not fit into the cluster, or a worker of it does not hold the model."""
        seats = seats or seat(plan, self.problem.cluster)
        if seats is None:
            return None
        if isinstance(plan, ColocatedPlan):
            kind = self.prefill_kind(plan.split)
            if kind is None:
                return None
            return colocated_fleet(plan, kind)
        prefill, decode = self.prefill_kind(plan.prefill), self.decode_kind(plan.decode)
        if prefill is None or decode is None:
            return None
        kv_bytes = self.problem.prefill_source.kv_bytes_per_token
        return split_fleet(plan, prefill, decode, self.problem.cluster, seats, kv_bytes)

    def charged(self, plan: Plan) -> float:
        if plan not in self._charged:
            self._charged[plan] = charged_gpus(plan, self.problem.cluster)
        return self._charged[plan]

    # ── trying them ──────────────────────────────────────────────────────────────────────────

    def keeps(self, fleet: Fleet, rate_per_s: float, sample: int = 0) -> bool:
        requests = self.problem.request_sets[sample]
        if rate_per_s >= capacity_per_s(fleet, requests):
            return False
        self.num_simulated_requests += len(requests)
        return keeps_slo(fleet, requests, self.problem.slo, rate_per_s)

    def goodput(
        self, fleet: Fleet, sample: int = 0, *, hint: float | None = None, kept: float = 0.0
    ) -> float:
        requests = self.problem.request_sets[sample]
        return goodput_per_s(fleet, requests, self.problem.slo, hint=hint, kept=kept)

    def estimate(self, fleet: Fleet, first: float | None = None) -> Estimate:
        """Over all request sets; `first` is the goodput on the first one, if it is known."""
        first = self.goodput(fleet) if first is None else first
        rest = range(1, len(self.problem.request_sets))
        return estimate([first, *(self.goodput(fleet, sample, hint=first) for sample in rest)])

    def at_rate(self, fleet: Fleet, rate_per_s: float) -> tuple[Timings, Trial, Attainment]:
        """On the first request set, with the parts of each request's time."""
        trial = trial_at(self.problem.requests, self.problem.slo, rate_per_s)
        timings = simulate(fleet, trial.requests, rate_per_s, with_parts=True)
        return timings, trial, attained(timings, trial.counted, self.problem.slo)

    # ── phases by themselves ─────────────────────────────────────────────────────────────────

    def prefill_alone(
        self, kind: WorkerKind, num_workers: int, requests: Requests, *, kept: float = 0.0
    ) -> float:
        """Requests per second within the TTFT, decode taking no time; `kept` is known to be."""
        fleet = _phase_fleet(kind, instant_table(), num_workers, 1)
        slo = self.problem.slo
        if slo.ttft_s is None:
            return capacity_per_s(fleet, requests)
        alone = Slo(ttft_s=slo.ttft_s, tpot_s=None, attainment=slo.attainment)
        return goodput_per_s(fleet, requests, alone, tolerance=0.04, kept=kept)

    def decode_alone(
        self, kind: WorkerKind, num_workers: int, requests: Requests, *, kept: float = 0.0
    ) -> float:
        """Requests per second within the TPOT, prefill and transfer taking no time."""
        fleet = _phase_fleet(instant_table(), kind, 1, num_workers)
        slo = self.problem.slo
        if slo.tpot_s is None:
            return capacity_per_s(fleet, requests)
        alone = Slo(ttft_s=None, tpot_s=slo.tpot_s, attainment=slo.attainment)
        return goodput_per_s(fleet, requests, alone, tolerance=0.04, kept=kept)


def instant_table() -> StepTable:
    grid = np.array([1.0, 2.0])
    zeros, ones = np.zeros(2), np.full(1025, 1e-9)
    return StepTable(np.array([grid, zeros + 1e-9, zeros, zeros + 1e-9, zeros]), ones, np.zeros(1025), 1)


def _phase_fleet(
    prefill: WorkerKind | StepTable, decode: WorkerKind | StepTable, num_prefill: int, num_decode: int
) -> SplitFleet:
    return SplitFleet(
        prefill=prefill.table if isinstance(prefill, WorkerKind) else prefill,
        num_prefill=num_prefill,
        decode=decode.table if isinstance(decode, WorkerKind) else decode,
        num_decode=num_decode,
        links=Links.free(num_prefill, num_decode),
        prefill_kv_tokens=prefill.kv_tokens if isinstance(prefill, WorkerKind) else UNLIMITED,
        decode_kv_tokens=decode.kv_tokens if isinstance(decode, WorkerKind) else UNLIMITED,
        batch_tokens=prefill.batch_tokens if isinstance(prefill, WorkerKind) else 1,
    )


def in_parallel(act: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """In order, on as many threads as the planner uses."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(act, items))


def ranked(candidates: Sequence[Candidate], *, is_rate_fixed: bool) -> list[Candidate]:
    """Best first. With a rate to serve, all of these serve it and the fewest GPUs win; otherwise
    goodput per charged GPU. Fewer GPUs decide ties."""
    if is_rate_fixed:
        return sorted(candidates, key=lambda c: (c.plan.num_gpus, -c.goodput.mean))
    return sorted(candidates, key=lambda c: (-c.per_gpu.mean, c.plan.num_gpus))


def equal_to_best(ranking: Sequence[Candidate], *, is_rate_fixed: bool) -> list[bool]:
    """Whose mean lies inside the best one's interval. With a rate to serve: those on as few GPUs."""
    if not ranking:
        return []
    best = ranking[0]
    if is_rate_fixed:
        return [c.plan.num_gpus == best.plan.num_gpus and c.goodput.mean >= best.goodput.low for c in ranking]
    return [c.per_gpu.mean >= best.per_gpu.low for c in ranking]
