"""A decode worker: the shared runtime around an engine that fetches KV and generates."""

from __future__ import annotations

from baton.contract.lifecycle import WorkerRole
from baton.worker.engines import build_engine
from baton.worker.process import run_worker
from decode_worker.settings import DecodeWorkerSettings


def run(settings: DecodeWorkerSettings) -> int:
    role, policy = WorkerRole.DECODE, settings.kv_load_failure_policy
    return run_worker(settings, role, lambda: build_engine(settings, role, kv_load_failure_policy=policy))
