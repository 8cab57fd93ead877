"""A prefill worker: the shared runtime around an engine that holds finished KV under a lease."""

from __future__ import annotations

from baton.contract.lifecycle import WorkerRole
from baton.worker.engines import build_engine, prefill_schedule, prefill_window_tokens
from baton.worker.process import run_worker
from prefill_worker.settings import PrefillWorkerSettings


def run(settings: PrefillWorkerSettings) -> int:
    role = WorkerRole.PREFILL
    return run_worker(
        settings,
        role,
        lambda worker_id: build_engine(
            settings,
            role,
            worker_id=worker_id,
            kv_lease_s=settings.kv_lease_s,
            schedule=prefill_schedule(settings, settings.scheduler),
        ),
        prefill_window_tokens=prefill_window_tokens(settings, settings.prefill_window_tokens),
    )
