"""Parallel engines. Tensor parallel sizes may differ, pipeline stages may not. Slow on few cores."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baton.contract.lifecycle import WorkerRole
from baton.contract.sampling import SamplingSpec
from tests.engine.pair import EnginePair, LegResult

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow, pytest.mark.timeout(600)]

GREEDY = SamplingSpec(max_tokens=10, temperature=0.0, ignore_eos=True)
PREEMPTING = {"scheduler": "skip-join-mlfq", "max_batch_size": 2, "max_resident_sequences": 8}


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"tensor_parallel_size": 1}, {"tensor_parallel_size": 2, **PREEMPTING}),
        ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}),
        ({"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 2, **PREEMPTING}),
    ],
    ids=["tensor-1-to-2", "tensor-2-to-1", "pipeline-2-to-2"],
)
def test_parallel_sizes(demo_model: Path, prefill: dict[str, Any], decode: dict[str, Any]) -> None:
    pair = EnginePair(demo_model)
    try:
        pair.run(
            pair.start(prefill=prefill, decode=decode, kv_lease_s=60),
            timeout_s=300,
        )
        for num_tokens in (1, 32, 100):
            prompt = [(num_tokens * 31 + i * 17) % 2000 for i in range(num_tokens)]
            sampling = msgspec.structs.replace(GREEDY, logprobs=0)
            expected = pair.run(pair.colocated(prompt, sampling))
            pair.run(pair.forget_prefixes())
            for first_token_by in WorkerRole:
                _, result = pair.run(pair.handoff(prompt, sampling, first_token_by=first_token_by))
                assert result.token_ids == expected.token_ids
        # Long ones first: a decode worker that preempts lets the short ones pass.
        jobs = [
            ([(position * 13 + i * 17) % 2000 for i in range(40)], SamplingSpec(
                max_tokens=num_tokens, temperature=0.0, ignore_eos=True
            ))
            for position, num_tokens in enumerate([60, 60, 60, 6, 6, 6])
        ]  # fmt: skip

        async def together() -> list[LegResult]:
            return [result for _, result in await asyncio.gather(*(pair.handoff(*job) for job in jobs))]

        for job, result in zip(jobs, pair.run(together(), timeout_s=100), strict=True):
            assert result.token_ids == pair.run(pair.colocated(*job)).token_ids
        load = pair.decode.load()
        assert load.num_kv_transfer_failures == 0
        assert load.scheduler is None or load.scheduler.num_fallbacks == 0
        assert load.num_kv_bytes_received > 0
        pair.run(pair.wait_until_free())

        held = pair.run(pair.run_prefill([5] * 100, GREEDY, handoff_id="held"))
        assert held.kv_source is not None  # type: ignore[union-attr]

        async def abort() -> None:
            pair.prefill.abort("held")

        pair.run(abort())
        pair.run(pair.wait_until_free())
    finally:
        pair.close()
