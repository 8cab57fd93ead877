"""Parallel engines. Tensor parallel sizes may differ, pipeline stages may not. Slow on few cores."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from baton.contract.lifecycle import WorkerRole
from baton.contract.sampling import SamplingSpec
from tests.engine.pair import EnginePair

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow, pytest.mark.timeout(600)]

GREEDY = SamplingSpec(max_tokens=10, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"tensor_parallel_size": 1}, {"tensor_parallel_size": 2}),
        ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}),
        ({"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 2}),
    ],
    ids=["tensor-1-to-2", "tensor-2-to-1", "pipeline-2-to-2"],
)
def test_parallel_sizes(demo_model: Path, prefill: dict[str, int], decode: dict[str, int]) -> None:
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
        load = pair.decode.load()
        assert load.num_kv_transfer_failures == 0
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
