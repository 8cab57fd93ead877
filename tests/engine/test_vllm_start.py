"""How vLLM is started, without starting it: a constructor that fails or takes long, what its config says."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch

from baton.contract.errors import EngineFailed
from baton.contract.lifecycle import WorkerRole
from baton.engine.vllm.settings import VllmEngineSettings
from baton.engine.vllm.start import construct, describe
from baton.engine.vllm.transfer_params import NUM_STAGES


def config(*, use_mla: bool = False) -> SimpleNamespace:
    model = SimpleNamespace(
        get_num_kv_heads=lambda parallel: 4,  # of one rank
        get_total_num_kv_heads=lambda: 8,
        get_total_num_hidden_layers=lambda: 10,
        get_head_size=lambda: 64,
        dtype=torch.bfloat16,
        max_model_len=4096,
        use_mla=use_mla,
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(num_gpu_blocks=101, cache_dtype="auto", block_size=16),
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=32),
        kv_transfer_config=SimpleNamespace(engine_id="e1"),
    )


@pytest.mark.parametrize(("use_mla", "num_tensors"), [(False, 2), (True, 1)])
def test_a_description_counts_all_ranks_and_not_the_placeholder(use_mla: bool, num_tensors: int):
    settings = VllmEngineSettings(model="m", role=WorkerRole.PREFILL, tensor_parallel_size=2)
    found = describe(
        settings, config(use_mla=use_mla), side_channel_port=5600, can_stream=False, has_kv_events=True
    )
    assert found.capacity.num_blocks == 100
    assert found.capacity.kv_bytes_per_block == num_tensors * 10 * 8 * 64 * 2 * 16
    assert (found.capacity.max_batch_size, found.capacity.max_model_len) == (32, 4096)
    assert (found.layout.dtype, found.layout.num_kv_heads, found.layout.block_size_tokens) == (
        "bfloat16", 8, 16,
    )  # fmt: skip
    assert found.transfer_endpoint.endswith(":5600")
    assert found.has_kv_events and found.stream_params is None


def test_an_engine_that_streams_says_where():
    settings = VllmEngineSettings(
        model="m", role=WorkerRole.PREFILL, transfer="stream", tensor_parallel_size=2
    )
    found = describe(settings, config(), side_channel_port=5600, can_stream=True, has_kv_events=False)
    assert found.stream_params == {
        "remote_engine_id": "e1",
        "remote_host": settings.side_channel_host,
        "remote_port": 5600,
        "tp_size": 2,
        NUM_STAGES: 1,
    }


def test_what_vllm_raises_is_one_sentence():
    def broken() -> object:
        raise KeyError("no such model\nand a page more")

    with pytest.raises(EngineFailed, match="engine did not start: .*no such model"):
        asyncio.run(construct(broken))


def test_a_cancelled_start_shuts_down_what_came_up_meanwhile():
    shut_down: list[float] = []
    go_on = threading.Event()

    def slow() -> object:
        go_on.wait(10)
        return SimpleNamespace(shutdown=lambda timeout: shut_down.append(timeout))

    async def scenario() -> None:
        task = asyncio.create_task(construct(slow))
        await asyncio.sleep(0.05)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert shut_down == [0]
