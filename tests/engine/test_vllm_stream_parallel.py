"""Streams between engines of several ranks. Tensor parallel sizes may differ, pipeline stages may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.pair import EnginePair
from tests.engine.streams import GREEDY, random_prompt, streamed

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow, pytest.mark.timeout(600)]


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
            pair.start(
                prefill=prefill,
                decode=decode,
                transfer="stream",
                max_num_batched_tokens=128,
            ),
            timeout_s=300,
        )
        for num_tokens in (1, 32, 300):
            prompt = random_prompt(num_tokens, seed=20)
            expected = pair.run(pair.colocated(prompt, GREEDY))
            pair.run(pair.forget_prefixes())
            _, result = pair.run(streamed(pair, prompt), timeout_s=90.0)
            assert result.error is None
            assert result.token_ids == expected.token_ids
        pair.run(pair.wait_until_free(10.0))
    finally:
        pair.close()


def test_another_number_of_stages_is_refused_by_name(demo_model: Path) -> None:
    pair = EnginePair(demo_model)
    try:
        pair.run(
            pair.start(prefill={"pipeline_parallel_size": 2}, transfer="stream", kv_lease_s=60), timeout_s=300
        )
        prompt = random_prompt(100, seed=21)
        _, result = pair.run(streamed(pair, prompt), timeout_s=90.0)
        # It computes the prompt itself instead of taking one stage's layers for all.
        expected = pair.run(pair.colocated(prompt, GREEDY))
        assert result.token_ids == expected.token_ids
    finally:
        pair.close()
