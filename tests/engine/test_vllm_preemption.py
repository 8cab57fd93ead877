"""Preempting schedulers in real engines behind real hand-offs: the same tokens as one request at a time."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest
import torch

from baton.contract.lifecycle import WorkerRole
from baton.contract.sampling import SamplingSpec, StructuredOutput
from baton.engine.base import FinishedPrefill
from tests.engine.pair import EnginePair, LegResult
from tests.engine.streams import faulty_transfer_arguments, random_prompt, streamed

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow, pytest.mark.timeout(600)]

KV_BYTES = 24 * 131_072
"""24 blocks of 32 tokens of the demo model. A request of 100 + 150 tokens takes 8 of them."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_vllms_own_offload_keeps_the_tokens(demo_model: Path) -> None:
    """NIXL first and vLLM's offload connector second, asynchronous scheduling: as alone, up to rounding."""
    pair = EnginePair(demo_model)
    try:
        decode = {"scheduler": "skip-join-mlfq", "max_batch_size": 2, "max_resident_sequences": 16}
        pair.run(
            pair.start(
                decode=decode | {"host_kv_bytes": 64 << 20, "kv_cache_bytes": KV_BYTES},
                device="cuda", dtype="float32", max_model_len=512, kv_lease_s=60, gpu_memory_utilization=0.3,
            ),
            timeout_s=400,
        )  # fmt: skip
        sampling = SamplingSpec(max_tokens=150, temperature=0.0, ignore_eos=True)
        prompts = [[(position * 31 + i * 17) % 2000 for i in range(100)] for position in range(6)]

        async def together() -> list[LegResult]:
            return [r for _, r in await asyncio.gather(*(pair.handoff(p, sampling) for p in prompts))]

        for prompt, result in zip(prompts, pair.run(together(), timeout_s=200), strict=True):
            assert len(result.token_ids) == 150
            assert result.token_ids[:20] == pair.run(pair.colocated(prompt, sampling)).token_ids[:20]
    finally:
        pair.close()


@pytest.mark.parametrize("transfer", ["pull", "stream"])
def test_handed_off_requests_are_swapped_and_keep_their_tokens(demo_model: Path, transfer: str) -> None:
    """
    1. five long requests, eight short ones and two that must keep to a shape, for two places; memory for
       three long ones
    2. their KV comes by NIXL, leaves for the host and comes back; nothing is computed twice. Streamed: the
       prefill engine computes them in another order than that in which blocks are promised to them
    3. every answer is what the engine says when it is asked alone
    """
    pair = EnginePair(demo_model)
    try:
        pair.run(
            pair.start(
                prefill={"scheduler": "shortest-prefill", "max_num_batched_tokens": 64},
                decode={
                    "scheduler": "skip-join-mlfq", "max_batch_size": 2, "max_resident_sequences": 16,
                    "host_kv_bytes": 64 << 20, "kv_cache_bytes": KV_BYTES,
                },
                max_model_len=512,
                kv_lease_s=60,
                transfer=transfer,
            ),
            timeout_s=400,
        )  # fmt: skip
        sizes = [(100, 150)] * 5 + [(20 + 7 * i, 8) for i in range(8)]
        jobs = [
            (
                [(position * 31 + i * 17) % 2000 for i in range(num_prompt)],
                SamplingSpec(max_tokens=num_output, temperature=0.0, ignore_eos=True),
            )
            for position, (num_prompt, num_output) in enumerate(sizes)
        ]
        shape = StructuredOutput(regex="[0-9]{20}-[a-z]{20}")
        jobs += [
            (
                [(i * 11 + start) % 2000 for i in range(30)],
                SamplingSpec(max_tokens=60, temperature=0.0, structured_output=shape),
            )
            for start in (5, 6)
        ]

        def handoff(
            prompt: list[int], sampling: SamplingSpec
        ) -> Awaitable[tuple[FinishedPrefill, LegResult]]:
            # A grammar starts with the answer: whoever continues it must have sampled all of it.
            has_shape = sampling.structured_output is not None
            if transfer == "stream":
                return streamed(pair, prompt, sampling=sampling, has_first_token=not has_shape)
            by = WorkerRole.DECODE if has_shape else WorkerRole.PREFILL
            return pair.handoff(prompt, sampling, first_token_by=by)

        async def together() -> list[LegResult]:
            return [result for _, result in await asyncio.gather(*(handoff(*job) for job in jobs))]

        results = pair.run(together(), timeout_s=200)
        load = pair.decode.load()
        for job, result in zip(jobs, results, strict=True):
            assert result.error is None
            assert result.token_ids == pair.run(pair.colocated(*job)).token_ids
        assert load.scheduler is not None
        assert load.scheduler.num_swaps_out > 0
        assert load.scheduler.num_swaps_in > 0
        assert load.scheduler.num_swapped_bytes > 0
        assert load.scheduler.num_recomputed_tokens == 0
        assert load.scheduler.num_fallbacks == 0
        assert load.num_kv_transfers == len(jobs)
        pair.run(pair.wait_until_free())
    finally:
        pair.close()


def test_a_prefill_that_is_preempted_while_it_streams_goes_on_from_where_it_stood(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    1. a long prompt has begun, and pauses after each chunk; memory for 23 blocks, it needs 20
    2. short ones overtake it, and nobody takes their KV yet: the long one's blocks are taken away
    3. the short ones' readers come; the long one is computed again, and only what was missing is written
    """
    importlib.import_module("baton.engine.vllm.engine")
    monkeypatch.setattr("baton.engine.vllm.engine.transfer_arguments", faulty_transfer_arguments)
    pair = EnginePair(demo_model)
    try:
        pair.run(
            pair.start(
                prefill={
                    "scheduler": "shortest-prefill", "max_num_batched_tokens": 64, "kv_cache_bytes": KV_BYTES,
                },
                max_model_len=704,
                kv_lease_s=60,
                transfer="stream",
            ),
            timeout_s=400,
        )  # fmt: skip
        sampling = SamplingSpec(max_tokens=6, temperature=0.0, ignore_eos=True)
        long, *shorts = [random_prompt(20 * 32, seed=50)] + [random_prompt(50, seed=51 + i) for i in range(7)]

        async def story() -> list[LegResult]:
            legs = [asyncio.create_task(streamed(pair, long, sampling=sampling, fault="slow"))]
            deadline_s = time.monotonic() + 30.0
            while pair.prefill.load().num_prefill_tokens_done == 0:
                assert time.monotonic() < deadline_s, "no prefill step"
                await asyncio.sleep(0.01)
            legs += [
                asyncio.create_task(streamed(pair, prompt, sampling=sampling, decode_after_s=2.0))
                for prompt in shorts
            ]
            return [result for _, result in await asyncio.gather(*legs)]

        results = pair.run(story(), timeout_s=200)
        load = pair.prefill.load()
        for prompt, result in zip([long, *shorts], results, strict=True):
            assert result.error is None
            assert result.token_ids == pair.run(pair.colocated(prompt, sampling)).token_ids
        assert load.scheduler is not None
        assert load.scheduler.num_recomputed_tokens > 0, "nothing was preempted"
        pair.run(pair.wait_until_free())
    finally:
        pair.close()
