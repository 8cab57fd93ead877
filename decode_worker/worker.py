"""A decode worker: the shared runtime around an engine that fetches KV and generates."""

from __future__ import annotations

from baton.contract.lifecycle import WorkerRole
from baton.worker.engines import EngineSchedule, build_engine
from baton.worker.process import run_worker
from decode_worker.settings import DecodeWorkerSettings


def run(settings: DecodeWorkerSettings) -> int:
    role = WorkerRole.DECODE
    return run_worker(
        settings,
        role,
        lambda worker_id: build_engine(
            settings,
            role,
            worker_id=worker_id,
            kv_load_failure_policy=settings.kv_load_failure_policy,
            schedule=EngineSchedule(
                policy=settings.scheduler,
                max_resident_sequences=settings.max_resident_sequences,
                host_kv_gib=settings.host_kv_gib,
            ),
        ),
    )
