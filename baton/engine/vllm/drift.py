"""Is this the vLLM whose private names our scheduler uses? Checked before an engine starts.

vLLM's scheduler is not a public interface. What `mlfq_scheduler` relies on is written down here:
names and signatures, and a hash of the source of the methods whose inner order of events matters. If
anything differs the engine starts with vLLM's own scheduler, says so loudly, and counts it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

SIGNATURES = {
    "schedule": "(self, throttle_prefills)",
    "_preempt_request": "(self, request, timestamp, drop_stale_output)",
    "_update_request_with_output": "(self, request, new_token_ids, is_stale)",
    "_update_after_schedule": "(self, scheduler_output)",
    "_free_request": "(self, request, delay_free_blocks)",
    "_update_request_as_session": "(self, session, update)",
    "_is_blocked_waiting_status": "(status)",
    "add_request": "(self, request)",
    "finish_requests": "(self, request_ids, finished_status)",
    "update_from_output": "(self, scheduler_output, model_runner_output)",
}
"""Parameter names of methods of vLLM's Scheduler that we call or override."""

ATTRIBUTES = (
    "running",
    "waiting",
    "kv_holding_waiting",
    "max_num_active_reqs",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "current_step",
    "finished_recving_kv_req_ids",
    "requires_kv_delivery",
    "_pause_state",
)
"""Set by the constructor of vLLM's Scheduler."""

REQUEST_ATTRIBUTES = (
    "next_decode_eligible_step",
    "num_in_flight_tokens",
    "num_preemptions",
    "is_prefill_chunk",
    "num_prompt_tokens",
    "max_tokens",
    "_output_token_ids",
    "resumable",
    "spec_token_ids",
)

KNOWN_SOURCES: Mapping[str, frozenset[str]] = {
    "schedule": frozenset({"da4f2cf2fc39c39e"}),
    "_preempt_request": frozenset({"4113f5de8a84ec25"}),
}
"""First 16 digits of the SHA-256 of each method's source, for every version that was tested (0.32.0)."""


def drift(scheduler: type, request: type) -> list[str]:
    """What is not as expected of vLLM's Scheduler and Request; empty: nothing."""
    problems = []
    for name, expected in SIGNATURES.items():
        method = getattr(scheduler, name, None)
        if method is None:
            problems.append(f"Scheduler.{name} is gone")
            continue
        found = f"({', '.join(inspect.signature(method).parameters)})"
        if found != expected:
            problems.append(f"Scheduler.{name} takes {found}, expected {expected}")
    for owner, attributes in ((scheduler, ATTRIBUTES), (request, REQUEST_ATTRIBUTES)):
        constructor = inspect.getsource(owner.__init__)  # type: ignore[misc]
        problems += [
            f"{owner.__name__}.{name} is gone" for name in attributes if f"self.{name}" not in constructor
        ]
    for name, known in KNOWN_SOURCES.items():
        method = getattr(scheduler, name, None)
        if method is not None and (found := source_hash(method)) not in known:
            problems.append(f"the source of Scheduler.{name} has changed (hash {found})")
    return problems


def source_hash(method: Any) -> str:
    return hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:16]


def installed_drift() -> list[str]:
    """Of the vLLM that is installed."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    return drift(Scheduler, Request)
