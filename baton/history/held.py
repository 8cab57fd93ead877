"""What a fleet still holds, from its own snapshot."""

from __future__ import annotations

from typing import Any


def what_is_held(fleet: dict[str, Any]) -> list[str]:
    """Everything in a `GET /fleet` that is not as in a fleet that serves nobody; empty for such a fleet."""
    held = [f"{name}={fleet[name]}" for name in ("num_requests", "num_queued") if fleet[name]]
    for worker in fleet["workers"]:
        name, load = worker["worker_id"], worker["load"]
        for account in ("num_legs", "num_queued_tokens", "num_reserved_blocks"):
            if worker[account]:
                held.append(f"{name}.{account}={worker[account]}")
        if num_used := num_used_blocks(worker):
            held.append(f"{name}: {num_used} blocks in use")
        for counter in ("num_running", "num_waiting"):
            if load[counter]:
                held.append(f"{name}.load.{counter}={load[counter]}")
    return held


def num_used_blocks(worker: dict[str, Any]) -> int:
    """KV blocks that the worker's engine could not hand out now; cached ones without a user do not count."""
    return int(worker["capacity"]["num_blocks"] - worker["load"]["num_free_blocks"])
