"""Streams between engines on a GPU: events before writes, piecewise graphs for layer hooks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.pair import EnginePair
from tests.engine.streams import GREEDY, random_prompt, streamed

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("is_signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("writes", ["chunk", "layer"])
@pytest.mark.parametrize("is_eager", [True, False], ids=["eager", "graphs"])
def test_streamed_output_equals_a_colocated_run(
    demo_model: Path, writes: str, is_eager: bool, is_signed: bool
) -> None:
    """A write that did not wait for its kernels would carry what the blocks held before; a signature that
    did not wait would be of that, or be sent before it was written."""
    pair = EnginePair(demo_model)
    try:
        pair.run(
            pair.start(
                device="cuda",
                transfer="stream",
                kv_stream_writes=writes,
                is_kv_digest_enabled=is_signed,
                is_eager=is_eager,
                max_num_batched_tokens=256,
            ),
            timeout_s=600,
        )
        for seed in range(20):
            prompt = random_prompt(1500 + seed, seed=seed)
            expected = pair.run(pair.colocated(prompt, GREEDY))
            pair.run(pair.forget_prefixes())
            _, result = pair.run(streamed(pair, prompt), timeout_s=90.0)
            assert result.error is None
            assert result.token_ids == expected.token_ids
        assert pair.decode.load().num_kv_digest_mismatches == 0
        pair.run(pair.wait_until_free(10.0))
    finally:
        pair.close()
