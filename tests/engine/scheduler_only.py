"""vLLM's real scheduler classes with a fake runner: no model, no worker, one token per request and step.
Imported, not collected."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE = 32


def engine_config(model: str, **arguments: Any) -> VllmConfig:
    defaults = {
        "model": model,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 1024,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
    }
    return EngineArgs(**(defaults | arguments)).create_engine_config()


@lru_cache
def hasher() -> Any:
    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK_SIZE, sha256)


def host_swap(num_bytes: int = 1 << 30) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="HostSwapConnector",
        kv_connector_module_path="baton.engine.vllm.host_swap",
        kv_role="kv_both",
        kv_connector_extra_config={"host_kv_bytes": num_bytes},
    )


def make_scheduler(cls: type, config: VllmConfig, *, num_blocks: int, **options: Any) -> Any:
    """`options` become Baton's, by name."""
    config.cache_config.num_gpu_blocks = num_blocks + 1
    config.additional_config = {"baton_scheduler": options}
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
    return cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )


def new_request(request_id: str, num_prompt: int, num_output: int, **extra: Any) -> Request:
    params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True, extra_args=extra or None)
    prompt = [(hash(request_id) + i) % 1000 for i in range(num_prompt)]
    return Request(request_id, prompt, params, None, block_hasher=hasher())


@dataclass
class Played:
    """What happened, in steps."""

    num_steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    batches: list[dict[str, int]] = field(default_factory=list)
    max_batch: int = 0
    max_gap: int = 0
    max_preemptions: int = 0
    num_scheduled_tokens: int = 0


def play(
    scheduler: Any,
    jobs: list[tuple[int, Request]],
    *,
    depth: int = 1,
    max_steps: int = 20_000,
    on_step: Any = None,
) -> Played:
    """`jobs` in order of arrival step. `depth`: steps in flight, 2 for asynchronous scheduling."""
    played = Played()
    waiting = deque(jobs)
    in_flight: deque[Any] = deque()
    last: dict[str, int] = {}
    while waiting or scheduler.has_unfinished_requests():
        while waiting and (waiting[0][0] <= played.num_steps or not scheduler.requests):
            _, request = waiting.popleft()
            last[request.request_id] = played.num_steps
            scheduler.add_request(request)
        played.num_steps += 1
        assert played.num_steps < max_steps, "stuck: " + describe(scheduler)
        output = scheduler.schedule()
        if on_step is not None:
            on_step(played.num_steps)
        for request in scheduler.requests.values():
            played.max_preemptions = max(played.max_preemptions, request.num_preemptions)
        played.batches.append(dict(output.num_scheduled_tokens))
        played.max_batch = max(played.max_batch, len(output.num_scheduled_tokens))
        played.num_scheduled_tokens += output.total_num_scheduled_tokens
        in_flight.append((output, run(scheduler, output)))
        if len(in_flight) < depth and output.num_scheduled_tokens:
            continue
        for outputs in scheduler.update_from_output(*in_flight.popleft()).values():
            for delta in outputs.outputs:
                request_id = delta.request_id
                count = len(delta.new_token_ids)
                played.num_tokens[request_id] = played.num_tokens.get(request_id, 0) + count
                if count:
                    played.max_gap = max(played.max_gap, played.num_steps - last[request_id])
                    last[request_id] = played.num_steps
                if delta.finish_reason is not None:
                    played.finished[request_id] = played.num_steps
    return played


def run(scheduler: Any, output: Any) -> ModelRunnerOutput:
    """A token for everyone whose known tokens are all computed after this step."""
    ids = list(output.num_scheduled_tokens)
    sampled = [[] if scheduler.requests[i].is_prefill_chunk else [7] for i in ids]
    orders = output.kv_connector_metadata
    received = {load.request_id for load in getattr(orders, "loads", [])}
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
        sampled_token_ids=sampled,
        kv_connector_output=KVConnectorOutput(finished_recving=received) if received else None,
    )


def describe(scheduler: Any) -> str:
    queues = {
        "running": scheduler.running, "waiting": scheduler.waiting, "holding": scheduler.kv_holding_waiting,
    }  # fmt: skip
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return f"{free} blocks free; " + "; ".join(
        name + " " + ", ".join(
            f"{r.request_id}({RequestStatus(r.status).name} {r.num_computed_tokens}/{r.num_tokens} "
            f"x{r.num_preemptions})" for r in queue
        )
        for name, queue in queues.items()
    )  # fmt: skip
