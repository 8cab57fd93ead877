"""A decode worker with room for one long prompt at a time, and a crowd in front of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.system.cases import BLOCK, random_prompt
from tests.system.fleet import Answer, Fleet

NUM_BLOCKS = 24
KV_GIB = (NUM_BLOCKS + 1) * 128 / (1 << 20)
"""A block of the demo model has 128 KiB; the first is vLLM's own."""

MAX_LEN = NUM_BLOCKS * BLOCK
NUM_REQUESTS = 64
MAX_QUEUED = 48
ENDS_WITHIN_S = 180.0

PREFILL = ("--transfer", "stream", "--max-model-len", str(MAX_LEN))
DECODE = (*PREFILL, "--kv-cache-gib", f"{KV_GIB:.6f}")

WAYS: dict[str, dict[str, Any]] = {"streamed": {}, "pulled": {"prompt_logprobs": 0}}


@pytest.mark.parametrize("way", ["streamed", "mixed"])
def test_nobody_hangs_before_a_tiny_decode_pool(start_real_fleet: Callable[..., Fleet], way: str) -> None:
    """
    lmcache#1215, #1337: a full decode buffer during chunked prefill locks up prefill, decode and proxy
    1. 64 prompts of more than half of the decode worker's 24 blocks come at once, 16 more than may wait
    2. each ends with 200 and the right tokens or with 429, none is computed in vain, none hangs
    3. nothing is held afterwards, and the largest prompt is answered
    """
    fleet = start_real_fleet(
        coordinator=("--max-queued", str(MAX_QUEUED), "--queue-timeout-s", str(ENDS_WITHIN_S)),
        prefill=PREFILL,
        decode=DECODE,
    )
    fleet.wait_until_idle(40.0)
    assert fleet.workers()["decode-1"]["capacity"]["num_blocks"] == NUM_BLOCKS
    ways = list(WAYS) if way == "mixed" else [way]

    def ask(number: int) -> Answer:
        # A few texts, so that each is told many times under different company.
        prompt = random_prompt((13 + number % 8) * BLOCK + 5, f"tiny {way} {number % 8}")
        body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        chosen = WAYS[ways[number % len(ways)]]
        return fleet.ask("POST", "/v1/completions", {**body, **chosen}, timeout_s=ENDS_WITHIN_S)

    alone = [ask(number).json["choices"][0]["text"] for number in range(8)]
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        answers = list(threads.map(ask, range(NUM_REQUESTS)))
    statuses = Counter(answer.status for answer in answers)
    print(f"{way}: {dict(statuses)}")
    assert set(statuses) <= {200, 429}, [a.body for a in answers if a.status not in (200, 429)]
    assert statuses[200] >= MAX_QUEUED
    for number, answer in enumerate(answers):
        if answer.status == 200:
            assert answer.json["choices"][0]["text"] == alone[number % 8]
        else:
            assert int(answer.headers["retry-after"]) >= 1
    fleet.wait_until_idle(40.0)
    largest = fleet.complete(random_prompt(MAX_LEN - 8, f"largest {way}"), max_tokens=8, ignore_eos=True)
    assert largest.status == 200
    assert largest.json["usage"]["completion_tokens"] == 8
