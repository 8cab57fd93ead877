"""An engine is killed while KV streams: the other one frees what nobody can write to any more."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.contract.lifecycle import WorkerRole
from baton.engine.base import EngineDescription, FinishedPrefill
from baton.engine.vllm.settings import VllmEngineSettings
from tests.engine.pair import EnginePair, LegResult, Recorder, begin_prefill
from tests.engine.streams import (
    CHUNK,
    GREEDY,
    faulty_streaming_pair,
    faulty_transfer_arguments,
    random_prompt,
    stream_source,
)

LEASE_S = 3


@pytest.fixture
def vllm_pair(demo_model: Path) -> Iterator[EnginePair]:
    with faulty_streaming_pair(demo_model, kv_lease_s=LEASE_S) as pair:
        yield pair


def kill_engine(engine: Any) -> None:
    for process in engine._llm.engine_core.resources.engine_manager.processes:
        os.kill(process.pid, signal.SIGKILL)


def begin_slow_stream(pair: EnginePair) -> tuple[str, asyncio.Future[Any], asyncio.Future[LegResult]]:
    """Its prefill takes more than a second."""
    handoff_id = f"slow-{pair.new_handoff_id()}"
    prompt = random_prompt(10 * CHUNK, seed=30)
    source = stream_source(pair, handoff_id, len(prompt))
    decoding = pair.begin_decode(prompt, GREEDY, source, handoff_id)
    prefilling = begin_prefill(pair.prefill, pair.prefill_listener, prompt, GREEDY, handoff_id)
    return handoff_id, prefilling, decoding


def test_a_prefill_engine_is_killed(vllm_pair: EnginePair) -> None:
    async def story() -> LegResult:
        _, _, decoding = begin_slow_stream(vllm_pair)
        await asyncio.sleep(0.6)
        kill_engine(vllm_pair.prefill)
        return await asyncio.wait_for(decoding, 30.0)

    result = vllm_pair.run(story(), timeout_s=40.0)
    assert result.token_ids == []
    assert result.error is not None
    assert result.error.code == "kv_transfer_failed"
    capacity = vllm_pair.decode_description.capacity
    assert vllm_pair.decode.load().num_free_blocks == capacity.num_blocks
    alone = vllm_pair.run(vllm_pair.run_decode(random_prompt(CHUNK, seed=31), GREEDY))
    assert len(alone.token_ids) == GREEDY.max_tokens


def test_a_decode_engine_is_killed(vllm_pair: EnginePair) -> None:
    async def story() -> FinishedPrefill | LegResult:
        _, prefilling, _ = begin_slow_stream(vllm_pair)
        await asyncio.sleep(0.6)
        kill_engine(vllm_pair.decode)
        finished: FinishedPrefill | LegResult = await asyncio.wait_for(prefilling, 30.0)
        return finished

    finished = vllm_pair.run(story(), timeout_s=40.0)
    assert isinstance(finished, FinishedPrefill)
    assert finished.kv_source is not None, "held for another decode worker"

    async def wait_until_free() -> None:
        deadline_s = time.monotonic() + 2.0 * LEASE_S
        while vllm_pair.prefill.load().num_free_blocks != vllm_pair.num_blocks()[0]:
            assert time.monotonic() < deadline_s, "blocks are held after the lease"
            await asyncio.sleep(0.05)

    vllm_pair.run(wait_until_free(), timeout_s=30.0)
    again = vllm_pair.run(vllm_pair.run_prefill(random_prompt(CHUNK, seed=32), GREEDY, keep_kv=False))
    assert isinstance(again, FinishedPrefill)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_an_engine_whose_model_cannot_be_streamed_offers_no_streams(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The ranks find out when they see the model's KV. One log line says why; its pairs pull."""
    caplog.set_level("INFO", logger="baton.engine")
    vllm_engine = importlib.import_module("baton.engine.vllm.engine")
    monkeypatch.setattr(
        "baton.engine.vllm.engine.transfer_arguments",
        lambda settings: faulty_transfer_arguments(settings) | {"kv_connector": "RefusingStreamingConnector"},
    )
    settings = VllmEngineSettings(
        model=str(demo_model),
        role=WorkerRole.PREFILL,
        transfer="stream",
        max_model_len=512,
        kv_cache_bytes=64 << 20,
    )

    async def story() -> EngineDescription:
        engine = vllm_engine.VllmEngine(settings)
        description: EngineDescription = await engine.start(Recorder())
        await engine.stop()
        return description

    description = asyncio.run(story())
    assert description.stream_params is None
    assert not description.streams_first_token
    assert "kv streaming is not possible here: a test says so; KV is pulled" in caplog.text
