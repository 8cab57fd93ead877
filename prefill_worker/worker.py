"""A prefill worker: the shared runtime around an engine that holds finished KV under a lease.

It asks for no more prompts at once than keep its device busy (DistServe's L_m, OSDI'24 section 4.3):
beyond that, prompts batched together only wait for each other, and a queue in the engine can neither
be reordered nor be sent to another worker.
"""

from __future__ import annotations

from baton.contract.lifecycle import WorkerRole
from baton.worker.engines import build_engine
from baton.worker.process import run_worker
from prefill_worker.settings import PrefillWorkerSettings

SATURATING_TOKENS = {"cpu": 512, "cuda": 8192}
"""One core is busy with any prompt; 512 tokens fill an A100 with a 13B model, smaller models and newer
devices take several times that, and a round trip to the coordinator must fit in beside it."""


def run(settings: PrefillWorkerSettings) -> int:
    role = WorkerRole.PREFILL
    window = settings.prefill_window_tokens
    if window is None and settings.engine == "vllm":
        window = SATURATING_TOKENS[settings.device]
    return run_worker(
        settings,
        role,
        lambda: build_engine(settings, role, kv_lease_s=settings.kv_lease_s),
        prefill_window_tokens=window,
    )
