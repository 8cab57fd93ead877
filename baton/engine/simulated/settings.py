"""What can be set about a simulated engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from baton.contract.messages import KvLayout, WorkerCapacity
from baton.engine.base import EngineDescription
from baton.step_time import LinearStepTime, StepTime

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, ELEMENT_BYTES = 4, 2, 32, 4
"""The shape the invented KV claims to have: 2 KiB a token."""

INSTANT = LinearStepTime(base_s=0.0)
"""Steps take what the machine takes."""


def kv_bytes_per_block(block_size_tokens: int) -> int:
    return 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * ELEMENT_BYTES * block_size_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedEngineSettings:
    name: str = ""
    """Of the worker, by which others know it when faults are made (`faults`)."""
    model: str = "simulated"
    host: str = "127.0.0.1"
    transfer_port: int = 0
    """0: a free one."""
    num_blocks: int = 65_536
    block_size_tokens: int = 32
    max_batch_size: int = 256
    max_model_len: int = 32_768
    max_num_batched_tokens: int = 8_192
    step_time: StepTime = INSTANT
    is_streaming: bool = False
    """KV is offered, and taken, while it is computed."""
    transfer_s: float = 0.0
    """How long the KV of a whole prompt takes to another worker; a part of it takes that part."""
    kv_lease_s: float = 30.0
    kv_load_failure_policy: Literal["recompute", "fail"] = "recompute"
    mean_output_tokens: int | None = None
    """After about so many tokens the model ends a sequence by itself; None: never."""

    @property
    def kv_bytes_per_block(self) -> int:
        return kv_bytes_per_block(self.block_size_tokens)


def describe(
    settings: SimulatedEngineSettings, transfer_endpoint: str, stream_params: dict[str, Any]
) -> EngineDescription:
    return EngineDescription(
        layout=KvLayout(
            model=settings.model,
            engine="simulated 1",
            transfer="loopback 2",
            dtype="float32",
            num_layers=NUM_LAYERS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            block_size_tokens=settings.block_size_tokens,
            attention_backend="none",
            weights="invented",
        ),
        capacity=WorkerCapacity(
            num_blocks=settings.num_blocks,
            max_batch_size=settings.max_batch_size,
            max_model_len=settings.max_model_len,
            kv_bytes_per_block=settings.kv_bytes_per_block,
        ),
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        transfer_endpoint=transfer_endpoint,
        stream_params=stream_params if settings.is_streaming else None,
        streams_first_token=settings.is_streaming,
        has_kv_events=True,
    )
