"""KV that is asked for after its lease, from a pool that is written over at once.

The same recipe as `scripts/bench.sh correctness` runs with 500 requests. vLLM's own connector answers with
other prompts' text here, which shows that the recipe would notice; ours gives the right answer or an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.late_read import Verdicts, Way, answers_alone, late_reads, random_prompts, start_pair

NUM_REQUESTS = 40

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def asked_late(model: Path, *ways: Way, **settings: Any) -> list[Verdicts]:
    """One run of the recipe per way, in one pair of engines that ends with nothing held."""
    prompts = random_prompts(NUM_REQUESTS, seed="test")
    pair = start_pair(model, **settings)
    try:
        right = pair.run(answers_alone(pair, prompts))
        verdicts = []
        for way in ways:
            verdicts.append(pair.run(late_reads(pair, way, prompts, right, "test"), timeout_s=200.0))
            pair.run(pair.forget_prefixes())
            pair.run(pair.wait_until_free(10.0))
        return verdicts
    finally:
        pair.close()


def test_a_late_read_gives_the_right_text_or_an_error(demo_model: Path) -> None:
    """
    1. most requests ask when their lease is over: each gets the right answer or the typed error
    2. some are in time, and some are refused: both halves of the promise were used
    3. so it is with a decode worker that registers late for a stream
    """
    for verdicts in asked_late(demo_model, "pull", "stream", transfer="stream"):
        assert verdicts.num_requests == NUM_REQUESTS
        assert verdicts.num_different == 0
        assert verdicts.errors.keys() == {"kv_transfer_failed"}
        assert verdicts.num_equal > 0


def test_vllms_own_connector_answers_a_late_read_with_other_text(demo_model: Path) -> None:
    """The control: nothing failed, every request finished, and some answers are wrong."""
    (verdicts,) = asked_late(demo_model, "pull", is_stock=True)
    assert verdicts.num_requests == NUM_REQUESTS
    assert not verdicts.errors
    assert verdicts.num_different > 0
