"""Parallel engines. KV is pulled and streamed between tensor parallel sizes that differ; pipeline stages may
not. Slow to start on few cores, so a pair is asked for all it can do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baton.contract.lifecycle import WorkerRole
from baton.contract.sampling import SamplingSpec
from baton.engine.base import FinishedPrefill
from tests.engine.pair import EnginePair, LegResult
from tests.engine.streams import GREEDY, random_prompt, streamed

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow, pytest.mark.timeout(900)]

PREEMPTING = {"scheduler": "skip-join-mlfq", "max_batch_size": 2, "max_resident_sequences": 8}


@contextmanager
def started(
    demo_model: Path, prefill: dict[str, Any], decode: dict[str, Any], **common: Any
) -> Iterator[EnginePair]:
    pair = EnginePair(demo_model)
    try:
        pair.run(
            pair.start(prefill=prefill, decode=decode, kv_lease_s=60, max_num_batched_tokens=128, **common),
            timeout_s=500,
        )
        yield pair
    finally:
        pair.close()


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
    with started(demo_model, prefill, decode, transfer="stream") as pair:
        check_pulled(pair)
        check_streamed(pair)


def test_engines_that_only_pull(demo_model: Path) -> None:
    """They load another connector than those that can stream as well."""
    prefill, decode = {"tensor_parallel_size": 1}, {"tensor_parallel_size": 2, **PREEMPTING}
    with started(demo_model, prefill, decode, transfer="pull") as pair:
        check_pulled(pair)


def test_another_number_of_stages_is_refused_by_name(demo_model: Path) -> None:
    with started(demo_model, {"pipeline_parallel_size": 2}, {}, transfer="stream") as pair:
        prompt = random_prompt(100, seed=21)
        _, result = pair.run(streamed(pair, prompt), timeout_s=90.0)
        # It computes the prompt itself instead of taking one stage's layers for all.
        expected = pair.run(pair.colocated(prompt, GREEDY))
        assert result.token_ids == expected.token_ids


def check_pulled(pair: EnginePair) -> None:
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
        (
            [(position * 13 + i * 17) % 2000 for i in range(40)],
            SamplingSpec(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
        )
        for position, num_tokens in enumerate([60, 60, 60, 6, 6, 6])
    ]

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
    assert isinstance(held, FinishedPrefill)
    assert held.kv_source is not None

    async def abort() -> None:
        pair.prefill.abort("held")

    pair.run(abort())
    pair.run(pair.wait_until_free())


def check_streamed(pair: EnginePair) -> None:
    before = pair.decode.load()
    for num_tokens in (1, 32, 300):
        prompt = random_prompt(num_tokens, seed=20)
        expected = pair.run(pair.colocated(prompt, GREEDY))
        pair.run(pair.forget_prefixes())
        _, result = pair.run(streamed(pair, prompt), timeout_s=90.0)
        assert result.error is None
        assert result.token_ids == expected.token_ids
    pair.run(pair.wait_until_free(10.0))
    after = pair.decode.load()
    assert after.num_kv_bytes_received > before.num_kv_bytes_received
    assert after.num_kv_transfer_failures == 0
