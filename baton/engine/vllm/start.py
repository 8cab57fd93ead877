"""vLLM coming up and going away: the constructor that blocks, what the engine is then, its first pass.

No state: `engine` calls these in its `start` and `stop`.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm import __version__ as vllm_version
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import SamplingParams

from baton.contract.errors import EngineFailed, ServingError
from baton.contract.messages import KvLayout, WorkerCapacity
from baton.engine.base import EngineDescription
from baton.engine.vllm.settings import VllmEngineSettings
from baton.engine.vllm.transfer_params import NUM_STAGES
from baton.engine.weights import weights_identity

logger = logging.getLogger("baton.engine")


async def construct(make: Callable[[], Any]) -> Any:
    """What `make` answers, called in a thread: AsyncLLM's constructor blocks until the child is up, seconds,
    minutes for a large model. Raises EngineFailed with a sentence. Cancelled, it ends the child first."""
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1, thread_name_prefix="engine-start")
    children_before = set(multiprocessing.active_children())
    construction = loop.run_in_executor(executor, make)
    try:
        return await asyncio.shield(construction)
    except asyncio.CancelledError:
        # The constructor cannot be interrupted, but it notices when its child dies.
        while not construction.done():
            for child in set(multiprocessing.active_children()) - children_before:
                child.kill()
            await asyncio.wait([construction], timeout=0.2)
        if construction.exception() is None:
            construction.result().shutdown(timeout=0)
        raise
    except ServingError:
        raise
    except Exception as error:  # whatever vLLM raises about a model or a setting
        logger.exception("engine did not start")
        raise EngineFailed(f"engine did not start: {first_line(error)}") from error
    finally:
        executor.shutdown(wait=False)


def describe(
    settings: VllmEngineSettings,
    config: Any,
    *,
    side_channel_port: int,
    can_stream: bool,
    has_kv_events: bool,
    attention_backend: str | None = None,
) -> EngineDescription:
    """`config`: vLLM's, as it is once the engine is up."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    # Block 0 is vLLM's placeholder and is never handed out.
    num_blocks = cache.num_gpu_blocks - 1
    num_kv_heads = model.get_num_kv_heads(parallel) * settings.tensor_parallel_size
    num_layers = model.get_total_num_hidden_layers()
    kv_dtype_bytes = _dtype_bytes(cache.cache_dtype, model.dtype)
    num_tensors = 1 if model.use_mla else 2
    revision = getattr(getattr(model, "hf_config", None), "_commit_hash", None)
    kv_bytes_per_block = (
        num_tensors * num_layers * num_kv_heads * model.get_head_size() * kv_dtype_bytes * cache.block_size
    )
    return EngineDescription(
        layout=KvLayout(
            model=settings.model,
            engine=f"vllm {vllm_version}",
            transfer=f"nixl {_nixl_version()}" + (", kv digest" if settings.is_kv_digest_enabled else ""),
            dtype=str(model.dtype).removeprefix("torch."),
            num_layers=num_layers,
            num_kv_heads=model.get_total_num_kv_heads(),
            head_dim=model.get_head_size(),
            block_size_tokens=cache.block_size,
            cache_dtype=str(cache.cache_dtype),
            attention_backend=attention_backend,
            weights=weights_identity(settings.model, revision),
        ),
        capacity=WorkerCapacity(
            num_blocks=num_blocks,
            max_batch_size=config.scheduler_config.max_num_seqs,
            max_model_len=model.max_model_len,
            kv_bytes_per_block=kv_bytes_per_block,
        ),
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        transfer_endpoint=f"{settings.side_channel_host}:{side_channel_port}",
        stream_params=_stream_params(settings, config, side_channel_port) if can_stream else None,
        streams_first_token=can_stream,
        has_kv_events=has_kv_events,
    )


def _stream_params(settings: VllmEngineSettings, config: Any, side_channel_port: int) -> dict[str, Any]:
    """Where a decode engine finds this one before there is a prompt."""
    return {
        "remote_engine_id": config.kv_transfer_config.engine_id,
        "remote_host": settings.side_channel_host,
        "remote_port": side_channel_port,
        "tp_size": settings.tensor_parallel_size,
        NUM_STAGES: settings.pipeline_parallel_size,
    }


async def warm_up(llm: Any, block_size_tokens: int, max_model_len: int) -> None:
    """The first forward pass loads kernels and takes up to a second: pay it before serving."""
    num_tokens = min(2 * block_size_tokens + 1, max_model_len - 3)
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    prompt = tokens_input([1] * max(1, num_tokens))
    async for _ in llm.generate(prompt, params, "warm-up"):
        pass
    await llm.reset_prefix_cache()


def close_sockets(resources: Any) -> None:
    """vLLM leaves its ZeroMQ context to the garbage collector, which warns of it at any later time."""
    for socket in (resources.input_socket, resources.output_socket):
        if socket is not None and not socket.closed:
            socket.close(linger=0)
    resources.ctx.term()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dtype_bytes(cache_dtype: str, model_dtype: Any) -> int:
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    dtype = model_dtype if cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[cache_dtype]
    num_bytes: int = dtype.itemsize
    return num_bytes


def chosen_attention_backend(config: Any) -> str | None:
    """What vLLM chooses by itself for these settings; the model lies in another process. None: it does
    not tell here, as where it would have to ask a device."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends

    try:
        name: str = get_current_attn_backends(config)[0].get_name()
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        logger.info("attention backend not known: %s", first_line(error))
        return None
    return name


def _nixl_version() -> str:
    try:
        return version("nixl")
    except PackageNotFoundError:
        return "unknown"
