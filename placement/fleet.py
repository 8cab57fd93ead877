"""A plan as a fleet file: the same workers, on the GPUs where the plan put them."""

from __future__ import annotations

from typing import Any, Literal

from baton.launch.fleet_file import FleetFile, NodeFleet
from placement.cluster import Cluster, Split
from placement.plans import ColocatedPlan, Plan, SplitPlan, seat
from placement.workers import MAX_BATCH


class NotLaunchable(ValueError):
    """A sentence: why the fleet scripts cannot start this plan."""


def fleet_file(
    plan: Plan,
    cluster: Cluster,
    *,
    model: str,
    engine: Literal["vllm", "simulated"] = "vllm",
    batch_tokens: int | None = None,
    predicted: dict[str, Any] | None = None,
) -> FleetFile:
    """With `engine="simulated"` the workers need no GPUs. Raises NotLaunchable."""
    seats = seat(plan, cluster)
    if seats is None:
        raise NotLaunchable(f"{plan} does not fit into {cluster}")
    roles: list[tuple[str, Split, tuple[tuple[int, ...], ...]]]
    if isinstance(plan, ColocatedPlan):
        roles = [("both", plan.split, seats.prefill)]
    else:
        roles = [("prefill", plan.prefill, seats.prefill), ("decode", plan.decode, seats.decode)]
    for role, split, workers in roles:
        if any(len(set(stages)) > 1 for stages in workers):
            raise NotLaunchable(
                f"{role} workers of {split} span several nodes, which the scripts do not start"
            )
    num_nodes = len(cluster.prefill.node_sizes) + (0 if cluster.is_shared else len(cluster.decode.node_sizes))
    next_gpu = [0] * num_nodes
    devices: list[dict[str, list[str]]] = [{} for _ in range(num_nodes)]
    for role, split, workers in roles:
        offset = len(cluster.prefill.node_sizes) if role == "decode" and not cluster.is_shared else 0
        for stages in workers:
            node = stages[0] + offset
            first = next_gpu[node]
            next_gpu[node] += split.num_gpus
            group = ",".join(str(gpu) for gpu in range(first, next_gpu[node]))
            devices[node].setdefault(role, []).append(group)
    nodes = [
        {
            role: NodeFleet(
                num_workers=len(groups), devices=None if engine == "simulated" else ";".join(groups)
            )
            for role, groups in node.items()
        }
        for node in devices
        if node
    ]
    settings: dict[str, dict[str, Any]] = {
        role: _worker_settings(role, plan, split, model, engine, batch_tokens) for role, split, _ in roles
    }
    settings["coordinator"] = {"tokenizer": "none"} if engine == "simulated" else {"model": model}
    if len(nodes) > 1:
        settings["coordinator"]["host"] = "0.0.0.0"  # workers come from other hosts
    if isinstance(plan, SplitPlan):
        # The policies that were simulated.
        settings["coordinator"] |= {"prefill_policy": "p-token", "decode_policy": "smallest-batch"}
    return FleetFile(nodes=nodes, settings=settings, plan={"placement": str(plan)} | (predicted or {}))


def _worker_settings(
    role: str, plan: Plan, split: Split, model: str, engine: str, batch_tokens: int | None
) -> dict[str, Any]:
    settings: dict[str, Any] = {"engine": engine}
    if engine == "vllm":
        settings |= {"model": model, "device": "cuda", "kv_cache_gib": None}
    settings |= {"tensor_parallel_size": split.tensor, "pipeline_parallel_size": split.pipeline}
    settings["max_batch_size"] = MAX_BATCH
    chunk = plan.chunk_tokens if isinstance(plan, ColocatedPlan) else None
    if chunk is not None:
        settings["max_num_batched_tokens"] = chunk
    elif role != "decode" and batch_tokens is not None:
        settings["max_num_batched_tokens"] = batch_tokens
    return settings
