"""What any worker can be told; the roles add what is theirs. Flags and YAML keys derive from these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.engine.simulated.faults import parse_fault
from baton.settings import SettingsError, option
from baton.step_time.text import parse_step_time
from baton.wire.endpoints import DEFAULT_FLEET_PORT, DEFAULT_HOST, parse_address


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    coordinator: str = option(
        f"{DEFAULT_HOST}:{DEFAULT_FLEET_PORT}", "the coordinator's fleet address", metavar="HOST:PORT"
    )
    model: str | None = option(
        None, "model path or name; the same string on all workers, the transfer compares it"
    )
    worker_id: str | None = option(
        None, "name in logs and metrics, unique in the fleet; absent: role-<8 hex>"
    )
    engine: Literal["vllm", "simulated"] = option("vllm", "`simulated` computes no model: for tests and load")
    host: str = option(DEFAULT_HOST, "address at which other workers reach this one")
    transfer: Literal["pull", "stream"] = option(
        "stream",
        "`stream`: prefill workers write KV while they compute, into blocks that decode workers reserve; "
        "`pull`: decode workers read it when it is there, as between two of which one cannot stream",
    )
    transfer_port: int | None = option(None, "port that offers KV to other workers; absent: a free one")
    kv_digest: bool = option(
        False,
        "sign KV blocks where they are computed and compare where they arrive; all workers or none",
    )

    device: Literal["cpu", "cuda"] = option("cpu", "what the engine computes on")
    dtype: str = option("auto", "of weights and KV; `auto` takes the model's own")
    tensor_parallel_size: int = option(1, "ranks that share each layer")
    pipeline_parallel_size: int = option(1, "ranks that take layers in turn")
    block_size_tokens: int = option(32, "tokens of one KV block; CPU kernels take multiples of 32 only")
    max_model_len: int | None = option(None, "longest prompt + output in tokens; absent: the model's")
    max_batch_size: int = option(64, "sequences in one engine step")
    max_num_batched_tokens: int | None = option(
        None, "tokens in one engine step, longer prompts are computed in chunks; absent: the engine's choice"
    )
    kv_cache_gib: float | None = option(
        1.0, "memory for KV per rank; on a GPU that is all ours set it to null in YAML: what is free"
    )
    omp_threads: int = option(1, "CPU threads per rank; one, because two workers usually share few cores")
    is_remote_code_trusted: bool = option(False, "run Python code that comes with the model")

    drain_timeout_s: float = option(30.0, "how long running legs may finish at shutdown, seconds")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severe log line shown")
    exit_with_parent: bool = option(False, "die when the process that started this one dies")

    num_blocks: int | None = option(None, "simulated engine: KV blocks; absent: what kv_cache_gib holds")
    simulated_step_s: float = option(0.0, "simulated engine: seconds of one step; 0: as fast as possible")
    simulated_prefill_tokens_per_s: float | None = option(
        None, "simulated engine: speed of prefill; absent: prompts take no time"
    )
    simulated_step_time: str | None = option(
        None,
        "simulated engine: how long steps take, instead of the two above: MODEL@GPU, MODEL@GPUxTP, a file "
        "of `baton profile` (.json), or linear:base_s=0.004,per_prefill_token_s=2e-5,…",
        metavar="WHICH",
    )
    simulated_num_workers: int = option(
        1, "simulated engine: so many workers in this process, named worker_id-1, -2, …"
    )
    simulated_transfer_s: float = option(
        0.0, "simulated engine: seconds that a whole prompt's KV takes from this worker to another"
    )
    simulated_mean_output_tokens: int | None = option(
        None, "simulated engine: sequences end by themselves after about so many tokens; absent: never"
    )
    simulated_fault: tuple[str, ...] = option(
        (),
        "simulated engine: what goes wrong, for tests: POINT:ACTION[:KEY=VALUE,…], see "
        "docs/simulated-engines.md; repeat for several",
        metavar="SPEC",
    )

    def __post_init__(self) -> None:
        try:
            parse_address(self.coordinator, DEFAULT_FLEET_PORT)
        except ValueError as error:
            raise SettingsError(f"coordinator: {error}") from error
        if self.engine == "vllm" and not self.model:
            raise SettingsError("model is required")
        if self.worker_id is not None and not 1 <= len(self.worker_id) <= 128:
            raise SettingsError(f"worker_id has {len(self.worker_id)} characters, expected 1 to 128")
        if self.transfer_port is not None and not 0 < self.transfer_port < 65_536:
            raise SettingsError(f"transfer_port is {self.transfer_port}, expected 1 to 65535")
        for name in (
            "tensor_parallel_size", "pipeline_parallel_size", "block_size_tokens", "max_model_len",
            "max_batch_size", "max_num_batched_tokens", "omp_threads", "num_blocks",
            "simulated_mean_output_tokens", "simulated_num_workers",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}, expected at least 1")
        for name in ("drain_timeout_s", "simulated_step_s", "simulated_transfer_s"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.simulated_num_workers > 1:
            if self.engine == "vllm":
                raise SettingsError("simulated_num_workers: each vllm engine has a process of its own")
            if self.transfer_port is not None:
                raise SettingsError(
                    f"{self.simulated_num_workers} workers cannot share transfer_port {self.transfer_port}"
                )
        if self.simulated_step_time is not None:
            if self.simulated_step_s or self.simulated_prefill_tokens_per_s is not None:
                raise SettingsError(
                    "simulated_step_time excludes simulated_step_s and simulated_prefill_tokens_per_s"
                )
            try:
                parse_step_time(self.simulated_step_time)
            except ValueError as error:
                raise SettingsError(f"simulated_step_time: {error}") from error
        for text in self.simulated_fault:
            try:
                parse_fault(text)
            except ValueError as error:
                raise SettingsError(f"simulated_fault: {error}") from error
        for name in ("kv_cache_gib", "simulated_prefill_tokens_per_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingsError(f"{name} is {value}, expected more than 0")
