"""Streamed hand-offs between a pair of real engines. Imported, not collected."""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.contract.messages import KvSource
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.base import FinishedPrefill
from baton.engine.vllm.settings import VllmEngineSettings, transfer_arguments
from tests.engine.pair import EnginePair, LegResult, begin_prefill

GREEDY = SamplingSpec(max_tokens=12, temperature=0.0, ignore_eos=True)
CHUNK = 128
"""Prompt tokens in a step of a `faulty_streaming_pair`."""


def faulty_transfer_arguments(settings: VllmEngineSettings) -> dict[str, Any]:
    """Loads a connector that can be told to misbehave."""
    return transfer_arguments(settings) | {
        "kv_connector": "FaultyStreamingConnector",
        "kv_connector_module_path": "tests.engine.faulty_connector",
    }


@contextmanager
def faulty_streaming_pair(demo_model: Path, **settings: Any) -> Iterator[EnginePair]:
    """Both engines load a connector that can be told to misbehave."""
    importlib.import_module("baton.engine.vllm.engine")
    pair = EnginePair(demo_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baton.engine.vllm.engine.transfer_arguments", faulty_transfer_arguments)
        pair.run(
            pair.start(transfer="stream", max_num_batched_tokens=CHUNK, kv_cache_bytes=64 << 20, **settings),
            timeout_s=240.0,
        )
    yield pair
    pair.close()


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{num_tokens}/{seed}")
    return [rng.randrange(0, 2000) for _ in range(num_tokens)]


def stream_source(
    pair: EnginePair, handoff_id: str, num_tokens: int, *, has_first_token: bool = True
) -> KvSource:
    """What a decode worker has to know before the prefill has run."""
    config = pair.prefill._llm.vllm_config
    host, _, port = pair.prefill_description.transfer_endpoint.partition(":")
    return KvSource(
        lease_s=60.0,
        num_tokens=num_tokens,
        num_bytes=0,
        transfer_params={
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "baton_stream_id": handoff_id,
            "remote_engine_id": config.kv_transfer_config.engine_id,
            "remote_host": host,
            "remote_port": int(port),
            "tp_size": config.parallel_config.tensor_parallel_size,
            "baton_num_stages": config.parallel_config.pipeline_parallel_size,
            "remote_num_tokens": num_tokens,
            "baton_stream_first_token": has_first_token,
        },
    )


def begin_streamed_prefill(
    pair: EnginePair, prompt: list[int], handoff_id: str, writes: str
) -> asyncio.Future[FinishedPrefill | LegResult]:
    """As `Engine.start_prefill`, with a word about when to write."""
    done = pair.prefill_listener.expect(handoff_id)
    pair.prefill._start_leg(
        handoff_id,
        pack_token_ids(prompt),
        GREEDY,
        is_prefill=True,
        transfer_params={
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "baton_hold_unless_stopped": True,
            "baton_stream_id": handoff_id,
            "baton_stream_writes": writes,
        },
    )
    return done


async def streamed(
    pair: EnginePair,
    prompt: list[int],
    *,
    decode_after_s: float | None = None,
    fault: str = "none",
    writes: str | None = None,
    sampling: SamplingSpec = GREEDY,
    has_first_token: bool = True,
) -> tuple[FinishedPrefill, LegResult]:
    """`decode_after_s`: the decode worker comes late. None: it comes first. `writes`: chunk, layer or
    end; None: the engine's setting."""
    handoff_id = f"{fault}-{pair.new_handoff_id()}"
    source = stream_source(pair, handoff_id, len(prompt), has_first_token=has_first_token)

    def decode() -> asyncio.Future[LegResult]:
        return pair.begin_decode(prompt, sampling, source, handoff_id)

    decoding = decode() if decode_after_s is None else None
    if writes is None:
        prefilling = begin_prefill(pair.prefill, pair.prefill_listener, prompt, sampling, handoff_id)
    else:
        prefilling = begin_streamed_prefill(pair, prompt, handoff_id, writes)
    if decoding is None:
        await asyncio.sleep(decode_after_s or 0.0)
        decoding = decode()
    finished, result = await asyncio.gather(prefilling, decoding)
    assert isinstance(finished, FinishedPrefill), finished.error
    assert not any(delta.has_lost_kv for delta in pair.decode_listener.legs[handoff_id].deltas)
    return finished, result
