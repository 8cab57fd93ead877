"""Hand-offs by either way in a pair of engines, whose faults are planted by name. Imported, not collected."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from baton.engine.base import FinishedPrefill
from tests.engine.pair import EnginePair, LegResult, begin_prefill
from tests.engine.streams import GREEDY, stream_source

Way = Literal["pull", "stream"]


async def handed_off(pair: EnginePair, way: Way, prompt: list[int], fault: str) -> LegResult:
    """The decode leg's. `fault`: see `faulty_connector`."""
    handoff_id = f"{fault}-{pair.new_handoff_id()}"
    if way == "stream":
        source = stream_source(pair, handoff_id, len(prompt))
        decoding = pair.begin_decode(prompt, GREEDY, source, handoff_id)
        prefilling = begin_prefill(pair.prefill, pair.prefill_listener, prompt, GREEDY, handoff_id)
        _, result = await asyncio.gather(prefilling, decoding)
        return result
    finished = await pair.run_prefill(prompt, GREEDY, handoff_id=handoff_id)
    assert isinstance(finished, FinishedPrefill), finished.error
    return await pair.run_decode(prompt, GREEDY, finished.kv_source, handoff_id=handoff_id)


async def all_handed_off(
    pair: EnginePair, way: Way, prompts: Sequence[list[int]], fault: str, *, at_once: int
) -> list[LegResult]:
    places = asyncio.Semaphore(at_once)

    async def one(prompt: list[int]) -> LegResult:
        async with places:
            return await handed_off(pair, way, prompt, fault)

    return await asyncio.gather(*map(one, prompts))


async def answers_alone(pair: EnginePair, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What the decode engine says by itself. Its prefix cache is emptied before and after."""
    await pair.forget_prefixes()
    results = await asyncio.gather(*(pair.run_decode(prompt, GREEDY) for prompt in prompts))
    await pair.forget_prefixes()
    assert all(result.error is None for result in results)
    return [result.token_ids for result in results]
