"""What can be set about one vLLM engine, and how vLLM is told. No vLLM import at module level: the
settings of a worker are read before its engine's packages are (that takes seconds)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from baton.contract.errors import EngineFailed
from baton.contract.lifecycle import WorkerRole
from baton.ports import free_port, is_port_free
from baton.process_guard import ProcessIdentity
from baton.transfer.lease import DEFAULT_LEASE_S, DEFAULT_MARGIN_S, DEFAULT_PULL_TIMEOUT_S

GIB = 1 << 30

SINGLE_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its full name: on CPU vLLM turns the short name `uni` into the multi-process executor."""

KV_ROLES = {
    WorkerRole.PREFILL: "kv_producer",
    WorkerRole.DECODE: "kv_consumer",
    WorkerRole.BOTH: "kv_both",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmEngineSettings:
    model: str
    """Path or hub name. Prefill and decode need the same string: the transfer compares it."""
    role: WorkerRole
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "auto"
    """`auto` takes the model's own. (vLLM alone would narrow float32 to bfloat16, also on CPU, where that
    gains nothing and lets rounding decide between close tokens.)"""
    max_model_len: int | None = None
    """Prompt + output in tokens; None: what the model says."""
    block_size_tokens: int = 32
    """The CPU attention kernels take multiples of 32 only."""
    kv_cache_bytes: int | None = GIB
    """Per rank. None: vLLM decides from free memory (sensible on a GPU that is all ours)."""
    max_batch_size: int = 64
    """Sequences in one step."""
    scheduler: str = "fcfs"
    """Who gets the next step: vLLM's own order, or a policy of `baton.scheduling.registry` by name."""
    max_resident_sequences: int | None = None
    """Sequences that hold KV at once, running or parked, where the scheduler preempts. None: four times
    `max_batch_size`, so that arrivals find room to overtake."""
    host_kv_bytes: int = 0
    """Host memory per rank for KV of preempted sequences. 0: they are computed again."""
    max_num_batched_tokens: int | None = None
    """Tokens in one step; longer prompts are computed in chunks. None: vLLM's default."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    """Prefill and decode need the same number of stages, and each takes a side-channel port."""
    num_threads_per_rank: int = 1
    """OpenMP threads on CPU. One: prefill and decode worker usually share few cores."""
    side_channel_host: str = "127.0.0.1"
    """Where decode workers fetch this worker's NIXL metadata; an address they can reach."""
    side_channel_port: int = 0
    """0: a free one is chosen. One that is taken is an error before the engine starts."""
    kv_lease_s: int = int(DEFAULT_LEASE_S)
    """How long a finished prompt's KV is held for a reader. vLLM renews it while a decode worker
    reports the request as waiting; readers do not count on that."""
    kv_lease_margin_s: float = DEFAULT_MARGIN_S
    """A decode worker reads nothing this close to the lease's end."""
    kv_pull_timeout_s: float = DEFAULT_PULL_TIMEOUT_S
    """A read that takes longer has a peer that is stuck; transfers take milliseconds."""
    kv_load_failure_policy: Literal["recompute", "fail"] = "recompute"
    """What a decode worker does when KV did not arrive or came too late: compute the prompt itself
    (slower, same answer), or fail the leg so that the coordinator may retry elsewhere."""
    transfer: Literal["pull", "stream"] = "pull"
    """`pull`: a decode worker reads a finished prompt's KV. `stream`: the prefill worker can also write it
    while it computes, for decode workers that reserve blocks in time."""
    kv_stream_writes: Literal["chunk", "layer"] = "chunk"
    """When a streaming prefill worker writes: after each chunk, or after each layer of it (for slow links
    and prompts of one chunk; on GPUs it needs piecewise graphs)."""
    is_kv_digest_enabled: bool = False
    """Blocks are signed where they are computed and compared where they arrive; workers that hand off to each
    other must agree on it."""
    is_progress_thread_enabled: bool = False
    """NIXL's thread polls without pause: half a core per idle engine, and slower transfers where cores
    are few. Off is safe because a prefill engine steps while it holds KV."""
    is_prefix_caching_enabled: bool = True
    is_eager: bool | None = None
    """No graph compilation. None: eager on CPU (starts in seconds), compiled on a GPU."""
    gpu_memory_utilization: float | None = None
    """Only where kv_cache_bytes is None; vLLM's default otherwise."""
    seed: int = 0
    is_remote_code_trusted: bool = False
    start_timeout_s: float = 900.0
    """Loading a large model takes minutes; an engine that hangs must not hang its worker for ever."""

    @property
    def is_streaming(self) -> bool:
        return self.transfer == "stream" and self.reason_not_to_stream is None

    @property
    def reason_not_to_stream(self) -> str | None:
        """With `transfer` stream, why hand-offs are pulled all the same."""
        if self.role is WorkerRole.BOTH:
            return "a worker for both phases has one half of a stream"
        if self.host_kv_bytes and self.device != "cpu":
            return "host memory for KV is another connector's there"
        return None

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


def choose_side_channel_port(settings: VllmEngineSettings) -> int:
    """The first of as many consecutive ports as there are pipeline stages.

    Raises EngineFailed if a wished port cannot be bound: vLLM itself would wait for ever.
    """
    host, num_ports = settings.side_channel_host, settings.pipeline_parallel_size
    if settings.side_channel_port:
        for port in range(settings.side_channel_port, settings.side_channel_port + num_ports):
            if not is_port_free(host, port):
                raise EngineFailed(f"cannot listen on the transfer's side channel {host}:{port}: it is taken")
        return settings.side_channel_port
    try:
        return free_port(host, num_ports=num_ports)
    except OSError as error:
        raise EngineFailed(f"no side channel for the transfer: {error}") from error


def set_environment(settings: VllmEngineSettings, side_channel_port: int) -> None:
    """vLLM reads these from the environment only, in its child processes too."""
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = settings.side_channel_host
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(side_channel_port)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"] = "1"
    if settings.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = str(settings.num_threads_per_rank)
        os.environ["KMP_BLOCKTIME"] = "0"  # idle OpenMP threads sleep instead of spinning
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # binding puts all engines on the same cores
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would silently override kv_cache_bytes


def engine_arguments(settings: VllmEngineSettings, *, has_drifted: bool = False) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs, except the transfer's. `has_drifted`: this vLLM is
    not the one our scheduler knows, so it keeps its own."""
    arguments: dict[str, Any] = {
        "model": settings.model,
        "dtype": _dtype(settings),
        "block_size": settings.block_size_tokens,
        "max_num_seqs": settings.max_batch_size,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "distributed_executor_backend": SINGLE_PROCESS_EXECUTOR if settings.num_ranks == 1 else "mp",
        "enforce_eager": settings.device == "cpu" if settings.is_eager is None else settings.is_eager,
        "enable_prefix_caching": settings.is_prefix_caching_enabled,
        "seed": settings.seed,
        "trust_remote_code": settings.is_remote_code_trusted,
        "disable_log_stats": True,  # of vLLM's own loggers; ours is given separately
        "enable_log_requests": False,
    }
    optional = {
        "max_model_len": settings.max_model_len,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }
    arguments |= {name: value for name, value in optional.items() if value is not None}
    if settings.device == "cpu":
        arguments["scheduler_cls"] = "baton.engine.vllm.scheduler.QuietScheduler"
        arguments["worker_cls"] = "baton.engine.vllm.cpu_worker.BatonCPUWorker"
    elif settings.is_streaming and settings.role is WorkerRole.DECODE:
        arguments["scheduler_cls"] = "baton.engine.vllm.first_token.AsyncFirstTokenScheduler"
        arguments["async_scheduling"] = True
    if settings.scheduler != "fcfs" and not has_drifted:
        arguments |= _policy_arguments(settings)
    if settings.is_streaming:
        arguments["worker_extension_cls"] = "baton.transfer.nixl_stream_worker.StreamRefusal"
    if settings.is_streaming and settings.role is WorkerRole.PREFILL:
        # A step planned ahead would keep the first token from the decode worker for as long as it takes.
        arguments["async_scheduling"] = False
    return arguments


def _policy_arguments(settings: VllmEngineSettings) -> dict[str, Any]:
    is_cpu = settings.device == "cpu"
    is_decode = settings.role is WorkerRole.DECODE
    is_synchronous = is_cpu or (settings.is_streaming and settings.role is WorkerRole.PREFILL)
    name = "MlfqScheduler" if is_synchronous else "AsyncMlfqScheduler"
    num_residents = settings.max_resident_sequences or 4 * settings.max_batch_size
    arguments: dict[str, Any] = {
        "scheduler_cls": f"baton.engine.vllm.mlfq_scheduler.{name}",
        "max_num_seqs": num_residents if is_decode else settings.max_batch_size,
        "additional_config": {
            "baton_scheduler": {
                "policy": settings.scheduler,
                "max_batch_size": settings.max_batch_size,
                "is_offloaded": settings.host_kv_bytes > 0 and not is_cpu,
            }
        },
    }
    if not is_synchronous:
        arguments["async_scheduling"] = True
    return arguments


def _dtype(settings: VllmEngineSettings) -> str:
    config = Path(settings.model) / "config.json"
    if settings.dtype != "auto" or settings.device != "cpu" or not config.is_file():
        return settings.dtype
    model_config = json.loads(config.read_text(encoding="utf-8"))
    model_dtype = model_config.get("dtype") or model_config.get("torch_dtype")
    return "float32" if model_dtype == "float32" else settings.dtype


def transfer_arguments(settings: VllmEngineSettings) -> dict[str, Any]:
    """Keyword arguments of vLLM's KVTransferConfig. All roles get the same connector; with host memory
    for KV, NIXL is asked first and the host second (`swap_connector` says why)."""
    arguments = _nixl_arguments(settings)
    if not settings.host_kv_bytes:
        return arguments
    if settings.device == "cpu":
        arguments["kv_connector"] = (
            "SwappingStreamingNixlConnector" if settings.is_streaming else "SwappingNixlConnector"
        )
        arguments["kv_connector_module_path"] = "baton.engine.vllm.swap_connector"
        arguments["kv_connector_extra_config"]["host_kv_bytes"] = settings.host_kv_bytes
        return arguments
    offload = {
        "kv_connector": "SimpleCPUOffloadConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use_per_rank": settings.host_kv_bytes,
            # Copies what is about to be used again, ahead of its use, instead of every block that fills.
            "lazy_offload": True,
        },
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_role": arguments["kv_role"],
        "kv_load_failure_policy": arguments["kv_load_failure_policy"],
        "kv_connector_extra_config": {"connectors": [arguments, offload]},
    }


def _nixl_arguments(settings: VllmEngineSettings) -> dict[str, Any]:
    is_streaming = settings.is_streaming
    module = "nixl_stream_connector" if is_streaming else "nixl_connector"
    return {
        "kv_connector": "StreamingNixlConnector" if is_streaming else "LeasedNixlConnector",
        "kv_connector_module_path": f"baton.transfer.{module}",
        "kv_role": KV_ROLES[settings.role],
        "kv_load_failure_policy": settings.kv_load_failure_policy,
        "kv_connector_extra_config": {
            "kv_lease_duration": settings.kv_lease_s,
            "kv_lease_margin_s": settings.kv_lease_margin_s,
            "kv_pull_timeout_s": settings.kv_pull_timeout_s,
            "kv_stream_writes": settings.kv_stream_writes,
            "is_kv_digest_enabled": settings.is_kv_digest_enabled,
            "is_progress_thread_enabled": settings.is_progress_thread_enabled,
            "is_affinity_kept": True,
            "is_idle_pace_enabled": True,
            "owner": ProcessIdentity.current().to_dict(),
        },
    }
