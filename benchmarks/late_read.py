"""KV that is asked for after its lease, again and again: who notices, and who answers with other text.

The recipe of a silent corruption that users report (HTTP 200, wrong text): leases shorter than the time
until the decode worker asks, a prefill pool so small that freed blocks are written over at once, and
prompts in between that do so. Every answer is compared with what one engine alone says.

The pair of engines is that of the tests; what a coordinator does between the legs is done here: it keeps
a `KvSource` for a while and takes that time off its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import msgspec

from baton.contract.messages import KvSource
from baton.contract.sampling import SamplingSpec
from baton.engine.base import FinishedPrefill
from tests.engine.pair import EnginePair, LegResult
from tests.engine.streams import streamed

Way = Literal["pull", "stream"]

LEASE_S = 1
MARGIN_S = 0.2
LONGEST_DELAY_S = 2.5 * LEASE_S
"""Delays are uniform from nothing to this: three in five come after the lease."""

POOL_BLOCKS = 96
BLOCK_BYTES = 128 << 10
"""Of the demo model: 32 tokens, 4 layers, 4 KV heads of 32, keys and values, float32."""

CONCURRENCY = 16
PROMPT_TOKENS = (130, 220)
CHURN_TOKENS = 640
CHURN_PAUSE_S = 0.05
VOCABULARY = 2000

GREEDY = SamplingSpec(max_tokens=12, temperature=0.0, ignore_eos=True)


@dataclass(slots=True)
class Verdicts:
    """How the requests of one run ended."""

    num_equal: int = 0
    num_different: int = 0
    num_late: int = 0
    """Asked for when the lease was over."""
    errors: Counter[str] = field(default_factory=Counter)
    """By code."""

    @property
    def num_requests(self) -> int:
        return self.num_equal + self.num_different + self.errors.total()

    def count(self, result: LegResult, expected: Sequence[int]) -> None:
        if result.error is not None:
            self.errors[result.error.code] += 1
        elif result.token_ids == list(expected):
            self.num_equal += 1
        else:
            self.num_different += 1


def start_pair(model: Path, *, is_stock: bool = False, **settings: Any) -> EnginePair:
    """Two engines as the recipe wants them: short leases, and a prefill pool that is used up at once."""
    pair = EnginePair(model)
    common: dict[str, Any] = {
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "kv_lease_s": LEASE_S,
        "kv_lease_margin_s": MARGIN_S,
        "kv_cache_bytes": 64 << 20,
        "prefill": {"kv_cache_bytes": POOL_BLOCKS * BLOCK_BYTES},
    }
    with contextlib.ExitStack() as stack:
        if is_stock:
            from benchmarks.stock_engine import StockEngine, stock_arguments

            stack.enter_context(mock.patch("baton.engine.vllm.engine.transfer_arguments", stock_arguments))
            common["engine_class"] = StockEngine
        pair.run(pair.start(**(common | settings)), timeout_s=300.0)
    return pair


def random_prompts(num_prompts: int, seed: object) -> list[list[int]]:
    rng = random.Random(f"late read {seed}")
    return [
        [rng.randrange(VOCABULARY) for _ in range(rng.randint(*PROMPT_TOKENS))] for _ in range(num_prompts)
    ]


async def answers_alone(
    pair: EnginePair, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingSpec] | None = None
) -> list[list[int]]:
    """What the decode engine says by itself. Its prefix cache is emptied before and after."""
    await pair.forget_prefixes()
    samplings = sampling or [GREEDY] * len(prompts)
    results = await asyncio.gather(
        *(pair.run_decode(list(prompt), spec) for prompt, spec in zip(prompts, samplings, strict=True))
    )
    await pair.forget_prefixes()
    assert all(result.error is None for result in results)
    return [result.token_ids for result in results]


async def late_reads(
    pair: EnginePair, way: Way, prompts: Sequence[list[int]], expected: Sequence[Sequence[int]], seed: object
) -> Verdicts:
    verdicts = Verdicts()
    rng = random.Random(f"delays {seed}")
    delays_s = [rng.uniform(0.0, LONGEST_DELAY_S) for _ in prompts]
    places = asyncio.Semaphore(CONCURRENCY)

    async def one(prompt: list[int], right: Sequence[int], delay_s: float) -> None:
        async with places:
            hand_off = _pulled if way == "pull" else _streamed
            verdicts.count(await hand_off(pair, prompt, delay_s), right)
        verdicts.num_late += delay_s >= LEASE_S

    is_over = asyncio.Event()
    churn = asyncio.ensure_future(_churn(pair, seed, is_over))
    try:
        await asyncio.gather(*map(one, prompts, expected, delays_s))
    finally:
        is_over.set()
        await churn
    return verdicts


async def _pulled(pair: EnginePair, prompt: list[int], delay_s: float) -> LegResult:
    finished = await pair.run_prefill(prompt, GREEDY)
    assert isinstance(finished, FinishedPrefill), finished.error
    assert finished.kv_source is not None
    held_s = time.monotonic()
    await asyncio.sleep(delay_s)
    return await pair.run_decode(prompt, GREEDY, _less(finished.kv_source, time.monotonic() - held_s))


def _less(source: KvSource, kept_s: float) -> KvSource:
    """As a coordinator hands it on."""
    return msgspec.structs.replace(source, lease_s=max(0.0, source.lease_s - kept_s))


async def _streamed(pair: EnginePair, prompt: list[int], delay_s: float) -> LegResult:
    """The decode worker registers so late that the prefill, or even the hold after it, may be over."""
    _, result = await streamed(pair, prompt, decode_after_s=delay_s)
    return result


async def _churn(pair: EnginePair, seed: object, is_over: asyncio.Event) -> None:
    """Prompts that nobody hands off take every block that is free."""
    rng = random.Random(f"churn {seed}")
    while not is_over.is_set():
        prompt = [rng.randrange(VOCABULARY) for _ in range(CHURN_TOKENS)]
        await pair.run_prefill(prompt, GREEDY, keep_kv=False)
        await asyncio.sleep(CHURN_PAUSE_S)
