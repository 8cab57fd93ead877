"""Settings to an engine. Each kind is imported when it is asked for: a simulated worker starts in a
fraction of a second, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.contract.lifecycle import WorkerRole
from baton.engine.base import Engine
from baton.step_time import LinearStepTime, StepTime
from baton.step_time.text import parse_step_time
from baton.worker.settings import WorkerSettings

GIB = 1 << 30

PREFILL_WINDOW_TOKENS = {"cpu": 512, "cuda": 32_768}
"""Enough to keep a device busy over a round trip to the coordinator (512 tokens fill an A100 with a 13B
model: DistServe's L_m, OSDI'24 section 4.3), and on a GPU enough that the worker's own order has a choice and
a prompt need not go to whoever is free instead of whoever holds its prefix: with 8,192 tokens a
quarter of the prefix hits was lost in replays (docs/replay.md)."""

DEFAULT_PREFILL_SCHEDULER = "shortest-prefill"
"""With vLLM. In replays mean TTFT is 10 to 17 % lower where prompts queue, the 99th percentile the same."""

DEFAULT_LEASE_S = 30
DEFAULT_SIMULATED_MODEL_LEN = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSchedule:
    """Which of a worker's sequences run, and where the others wait."""

    policy: str = "fcfs"
    max_resident_sequences: int | None = None
    host_kv_gib: float = 0.0


def build_engine(
    settings: WorkerSettings,
    role: WorkerRole,
    *,
    worker_id: str = "",
    kv_lease_s: int = DEFAULT_LEASE_S,
    kv_load_failure_policy: Literal["recompute", "fail"] = "recompute",
    schedule: EngineSchedule | None = None,
) -> Engine:
    """Who prefills gives the lease, who decodes has the failure policy."""
    if settings.engine == "simulated":
        return _simulated(settings, role, worker_id, kv_lease_s, kv_load_failure_policy)
    return _vllm(settings, role, kv_lease_s, kv_load_failure_policy, schedule or EngineSchedule())


def prefill_window_tokens(settings: WorkerSettings, wished: int | None) -> int | None:
    """Prompt tokens a worker takes ahead of what it has computed. More would only wait for each other,
    and a queue in the engine can neither be reordered nor be sent to another worker."""
    if wished is None and settings.engine == "vllm":
        return PREFILL_WINDOW_TOKENS[settings.device]
    return wished


def prefill_schedule(settings: WorkerSettings, wished: str | None) -> EngineSchedule:
    if wished is None and settings.engine == "vllm":
        wished = DEFAULT_PREFILL_SCHEDULER
    return EngineSchedule(policy=wished or "fcfs")


def _simulated(
    settings: WorkerSettings,
    role: WorkerRole,
    worker_id: str,
    kv_lease_s: int,
    kv_load_failure_policy: Literal["recompute", "fail"],
) -> Engine:
    from baton.engine.simulated.engine import SimulatedEngine
    from baton.engine.simulated.faults import Faults
    from baton.engine.simulated.settings import SimulatedEngineSettings, kv_bytes_per_block

    block_bytes = kv_bytes_per_block(settings.block_size_tokens)
    num_blocks = settings.num_blocks or max(1, int((settings.kv_cache_gib or 1.0) * GIB) // block_bytes)
    max_model_len = settings.max_model_len or DEFAULT_SIMULATED_MODEL_LEN
    engine_settings = SimulatedEngineSettings(
        name=worker_id,
        model=settings.model or "simulated",
        host=settings.host,
        transfer_port=settings.transfer_port or 0,
        num_blocks=num_blocks,
        block_size_tokens=settings.block_size_tokens,
        max_batch_size=settings.max_batch_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=settings.max_num_batched_tokens or max_model_len,
        step_time=_step_time(settings),
        is_streaming=settings.transfer == "stream" and role is not WorkerRole.BOTH,
        transfer_s=settings.simulated_transfer_s,
        kv_lease_s=kv_lease_s,
        kv_load_failure_policy=kv_load_failure_policy,
        mean_output_tokens=settings.simulated_mean_output_tokens,
    )
    return SimulatedEngine(engine_settings, faults=Faults(*settings.simulated_fault))


def _step_time(settings: WorkerSettings) -> StepTime:
    if settings.simulated_step_time is not None:
        return parse_step_time(settings.simulated_step_time)
    tokens_per_s = settings.simulated_prefill_tokens_per_s
    return LinearStepTime(
        base_s=settings.simulated_step_s,
        per_prefill_token_s=1 / tokens_per_s if tokens_per_s is not None else 0.0,
    )


def _vllm(
    settings: WorkerSettings,
    role: WorkerRole,
    kv_lease_s: int,
    kv_load_failure_policy: Literal["recompute", "fail"],
    schedule: EngineSchedule,
) -> Engine:
    from baton.engine.vllm.engine import VllmEngine
    from baton.engine.vllm.settings import VllmEngineSettings

    assert settings.model is not None
    kv_cache_gib = settings.kv_cache_gib
    return VllmEngine(
        VllmEngineSettings(
            model=settings.model,
            role=role,
            device=settings.device,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            block_size_tokens=settings.block_size_tokens,
            kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * GIB),
            max_batch_size=settings.max_batch_size,
            scheduler=schedule.policy,
            max_resident_sequences=schedule.max_resident_sequences,
            host_kv_bytes=int(schedule.host_kv_gib * GIB),
            max_num_batched_tokens=settings.max_num_batched_tokens,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            num_threads_per_rank=settings.omp_threads,
            transfer=settings.transfer,
            is_kv_digest_enabled=settings.kv_digest,
            side_channel_host=settings.host,
            side_channel_port=settings.transfer_port or 0,
            kv_lease_s=kv_lease_s,
            kv_load_failure_policy=kv_load_failure_policy,
            is_remote_code_trusted=settings.is_remote_code_trusted,
        )
    )
