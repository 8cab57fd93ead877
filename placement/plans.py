"""A placement on paper, and the fleet the simulator gets for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from baton.step_time import kv_link
from placement.cluster import Cluster, Packing, Split
from placement.simulator import ColocatedFleet, Links, SplitFleet
from placement.workers import WorkerKind

WINDOW_TOKENS = 8192
"""The coordinator's window for prefill workers on GPUs, see `prefill_window_tokens`."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """`num_prefill` workers of one split, `num_decode` of another."""

    prefill: Split
    num_prefill: int
    decode: Split
    num_decode: int

    @property
    def num_gpus(self) -> int:
        return self.num_prefill * self.prefill.num_gpus + self.num_decode * self.decode.num_gpus

    def __str__(self) -> str:
        return f"{self.num_prefill}P {self.prefill} + {self.num_decode}D {self.decode}"


@dataclass(frozen=True, slots=True)
class ColocatedPlan:
    """Workers that do both phases; `chunk_tokens` per step and stage, or None for whole prompts first."""

    split: Split
    num_workers: int
    chunk_tokens: int | None

    @property
    def num_gpus(self) -> int:
        return self.num_workers * self.split.num_gpus

    def __str__(self) -> str:
        how = f"chunks of {self.chunk_tokens}" if self.chunk_tokens else "whole prompts"
        return f"{self.num_workers} colocated {self.split}, {how}"


Plan = SplitPlan | ColocatedPlan


@dataclass(frozen=True, slots=True)
class Seats:
    """Where the workers of one plan lie: per worker the node of each of its stages."""

    prefill: tuple[tuple[int, ...], ...]
    decode: tuple[tuple[int, ...], ...]


def seat(plan: Plan, cluster: Cluster, packings: tuple[Packing, Packing] | None = None) -> Seats | None:
    """None when it does not fit. Larger workers first; where there is a choice, decode workers go where a
    prefill worker is. `packings` are used up (the same object twice for a shared pool)."""
    if packings is None:
        packings = fresh_packings(cluster)
    of_prefill, of_decode = packings
    if isinstance(plan, ColocatedPlan):
        stages = [of_prefill.place(plan.split) for _ in range(plan.num_workers)]
        return None if None in stages else Seats(tuple(tuple(s or ()) for s in stages), ())
    prefill: list[list[int]] = []
    decode: list[list[int]] = []

    def add_prefill() -> bool:
        return _add(prefill, of_prefill, plan.prefill, decode)

    def add_decode() -> bool:
        return _add(decode, of_decode, plan.decode, prefill)

    orders: list[list[Callable[[], bool]]] = [
        [add_prefill] * plan.num_prefill + [add_decode] * plan.num_decode,
        [add_decode] * plan.num_decode + [add_prefill] * plan.num_prefill,
    ]
    is_decode_larger = plan.decode.num_gpus > plan.prefill.num_gpus
    if all(add() for add in orders[is_decode_larger]):
        return Seats(tuple(map(tuple, prefill)), tuple(map(tuple, decode)))
    return None


def _add(seats: list[list[int]], packing: Packing, split: Split, others: list[list[int]]) -> bool:
    near = others[len(seats) % len(others)][0] if others else None
    stages = packing.place(split, near)
    if stages is None:
        return False
    seats.append(stages)
    return True


def fresh_packings(cluster: Cluster) -> tuple[Packing, Packing]:
    of_prefill = Packing(cluster.prefill.node_sizes)
    return of_prefill, of_prefill if cluster.is_shared else Packing(cluster.decode.node_sizes)


def num_copies(plan: Plan, cluster: Cluster, limit: int | None = None) -> int:
    """How often the whole plan fits into the cluster side by side."""
    packings = fresh_packings(cluster)
    count = 0
    while (limit is None or count < limit) and seat(plan, cluster, packings) is not None:
        count += 1
    return count


def charged_gpus(plan: Plan, cluster: Cluster) -> float:
    """GPUs used, and the share of those that stay idle however often the plan is repeated: the cluster's
    GPUs over the copies it holds."""
    if not cluster.is_shared:
        return float(plan.num_gpus)  # the other pool cannot use what is left of this one
    copies = num_copies(plan, cluster)
    return cluster.num_gpus / copies if copies else float("inf")


def split_fleet(
    plan: SplitPlan, prefill: WorkerKind, decode: WorkerKind, cluster: Cluster, seats: Seats,
    kv_bytes_per_token: float,
) -> SplitFleet:  # fmt: skip
    return SplitFleet(
        prefill=prefill.table, num_prefill=plan.num_prefill, prefill_kv_tokens=prefill.kv_tokens,
        decode=decode.table, num_decode=plan.num_decode, decode_kv_tokens=decode.kv_tokens,
        batch_tokens=prefill.batch_tokens, window_tokens=max(WINDOW_TOKENS, prefill.batch_tokens),
        links=_links(plan, cluster, seats, kv_bytes_per_token),
    )  # fmt: skip


def _links(plan: SplitPlan, cluster: Cluster, seats: Seats, kv_bytes_per_token: float) -> Links:
    """A pair of workers whose stages lie on the same nodes moves KV inside them; any other pair over the
    network. As many links work at once as the smaller worker has ranks."""
    pairs = min(plan.prefill.num_gpus, plan.decode.num_gpus)
    inside = kv_link(cluster.prefill.gpu, is_same_node=True, num_pairs=pairs)
    inside_rate = inside.bytes_per_s
    if cluster.peer_bytes_per_s is not None:
        inside_rate = cluster.peer_bytes_per_s * pairs
    between = kv_link(cluster.prefill.gpu, is_same_node=False, num_pairs=pairs)
    between_rate = between.bytes_per_s
    source = np.arange(plan.num_prefill)
    target = np.arange(plan.num_decode)
    if cluster.node_network_bytes_per_s is not None:
        between_rate = cluster.node_network_bytes_per_s
        source = np.array([stages[0] for stages in seats.prefill])
        target = np.array([stages[0] for stages in seats.decode])
    kind = np.ones((plan.num_prefill, plan.num_decode), np.int64)
    if cluster.is_shared:
        for p, p_stages in enumerate(seats.prefill):
            for d, d_stages in enumerate(seats.decode):
                kind[p, d] = int(set(p_stages) != set(d_stages))
    return Links(
        kind=kind,
        source_node=source.astype(np.int64),
        target_node=target.astype(np.int64),
        base_s=np.array([inside.latency_s, between.latency_s]),
        token_s=np.array([kv_bytes_per_token / inside_rate, kv_bytes_per_token / between_rate]),
    )


def colocated_fleet(plan: ColocatedPlan, kind: WorkerKind) -> ColocatedFleet:
    stages = plan.split.pipeline
    if plan.chunk_tokens is None:
        return ColocatedFleet(
            table=kind.table, num_workers=plan.num_workers, kv_tokens=kind.kv_tokens,
            batch_tokens=kind.batch_tokens,
        )  # fmt: skip
    return ColocatedFleet(
        table=kind.table, num_workers=plan.num_workers, kv_tokens=kind.kv_tokens,
        mixed=kind.mixed(plan.chunk_tokens), batch_tokens=plan.chunk_tokens * stages,
    )  # fmt: skip
