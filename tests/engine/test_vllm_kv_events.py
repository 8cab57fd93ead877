"""Real vLLM engines tell what they hold: the coordinator's index predicts each hit exactly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.contract.messages import KvEvent
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.base import FinishedPrefill
from baton.policy.kv_feed import KvFeeds
from baton.policy.kv_index import KvIndex
from tests.engine.pair import EnginePair, Recorder

BLOCK = 32


@pytest.fixture(scope="module")
def vllm_pair(demo_model: Path) -> Iterator[EnginePair]:
    """Few blocks, so that prompts push each other out; chunks of two blocks."""
    pair = EnginePair(demo_model)
    pair.run(
        pair.start(kv_cache_bytes=3 << 20, max_model_len=512, max_num_batched_tokens=64), timeout_s=240.0
    )
    yield pair
    pair.close()


class Follower:
    """An index fed with what one engine's listener hears."""

    def __init__(self, listener: Recorder) -> None:
        self._listener = listener
        self._num_fed = 0
        self.index = KvIndex(BLOCK, seed=1)
        self.feeds = KvFeeds(self.index)
        self.feeds.joined(0, "boot")

    def predicted(self, prompt: list[int]) -> int:
        new = self._listener.kv_events[self._num_fed :]
        self._num_fed += len(new)
        if new:
            self.feeds.received(0, "boot", self.feeds.counters.num_batches, new)
        return BLOCK * self.index.match(self.index.prompt(pack_token_ids(prompt))).num_blocks


def prompts(seed: int, number: int) -> Iterator[list[int]]:
    """Sessions that go on, shared beginnings, new ones; some end on a block."""
    rng = random.Random(seed)
    texts: list[list[int]] = []
    for _ in range(number):
        fresh = [rng.randrange(5, 1000) for _ in range(rng.choice([1, 31, 32, 64, 97, 150]))]
        if texts and rng.random() < 0.7:
            base = rng.choice(texts[-6:])
            fresh = base[: rng.choice([len(base), 32, 64, 70])] + fresh
        texts.append(fresh[:400])
        yield texts[-1]


ONE = SamplingSpec(max_tokens=1, temperature=0.0)


def test_every_hit_of_a_prefill_engine_is_predicted(vllm_pair: EnginePair) -> None:
    follower = Follower(vllm_pair.prefill_listener)
    found: list[int] = []

    async def serve() -> None:
        for prompt in prompts(seed=3, number=60):
            await asyncio.sleep(0.05)  # events come by another way than outputs
            predicted = follower.predicted(prompt)
            finished = await vllm_pair.run_prefill(prompt, ONE, keep_kv=False)
            assert isinstance(finished, FinishedPrefill)
            assert finished.delta.num_cached_tokens == predicted
            found.append(predicted)

    vllm_pair.run(serve())
    assert sum(hit > 0 for hit in found) > 20
    assert follower.index.counters.num_removed > 0  # blocks were pushed out on the way
    assert follower.index.counters.num_unknown_removals == 0
    assert follower.index.counters.num_unknown_parents == 0


def test_a_decode_engine_holds_what_it_was_handed_and_what_it_generated(vllm_pair: EnginePair) -> None:
    """Prompt 100 + 40 tokens of output: the next turn, here, finds all full blocks of 139 tokens: the last
    token's KV is never computed."""
    follower = Follower(vllm_pair.decode_listener)
    prompt = next(prompts(seed=5, number=1)) + list(range(100, 200))
    prompt = prompt[:100]

    async def turns() -> tuple[list[int], int, int | None]:
        sampling = SamplingSpec(max_tokens=40, temperature=0.0, ignore_eos=True)
        _, answer = await vllm_pair.handoff(prompt, sampling)
        await asyncio.sleep(0.3)
        following = prompt + answer.token_ids + list(range(300, 310))
        predicted = follower.predicted(following)
        again = await vllm_pair.run_decode(following, ONE)
        assert again.last is not None
        return answer.token_ids, predicted, again.last.num_cached_tokens

    token_ids, predicted, found = vllm_pair.run(turns())
    assert len(token_ids) == 40
    assert predicted == found == 128  # 4 of 139 // 32


def test_a_batch_lost_on_the_way_is_replayed_by_vllm(vllm_pair: EnginePair) -> None:
    """
    1. the socket loses two batches: nothing of those prompts is heard
    2. the next batch shows it; vLLM tells the lost ones again, and each hit is predicted
    """
    follower = Follower(vllm_pair.prefill_listener)
    stream = vllm_pair.prefill._kv_events
    assert stream is not None
    order = stream._order
    lost = [[n] * 80 for n in (11, 12)]

    async def scenario() -> list[int]:
        take, order.received = order.received, lambda number, events: None  # type: ignore[method-assign]
        for prompt in lost:
            await vllm_pair.run_prefill(prompt, ONE, keep_kv=False)
        await asyncio.sleep(0.3)
        order.received = take  # type: ignore[method-assign]
        follower.predicted(lost[0])
        await vllm_pair.run_prefill([13] * 80, ONE, keep_kv=False)
        await asyncio.sleep(0.5)
        return [follower.predicted([n] * 80) for n in (11, 12, 13)]

    assert vllm_pair.run(scenario()) == [64, 64, 64]
    assert order.num_lost == 0


def test_progress_is_known_chunk_by_chunk(vllm_pair: EnginePair) -> None:
    """A prompt of 490 tokens in eight chunks: the running total moves on its way, in full blocks, and ends
    490 higher, the 10 behind the last full block included."""
    totals: list[int] = []
    listener = vllm_pair.prefill_listener
    hear = listener.on_kv_events
    before = vllm_pair.prefill.load().num_prefill_tokens_done

    def note(events: list[KvEvent]) -> None:
        totals.append(vllm_pair.prefill.load().num_prefill_tokens_done - before)
        hear(events)

    listener.on_kv_events = note  # type: ignore[method-assign]
    vllm_pair.run(vllm_pair.run_prefill([*range(400, 890)], ONE, keep_kv=False))
    vllm_pair.run(asyncio.sleep(0.3))
    del listener.on_kv_events
    assert totals == sorted(totals) and totals[0] < 490
    assert {total % 32 for total in totals} <= {0, 10}
    assert vllm_pair.prefill.load().num_prefill_tokens_done - before == 490


def test_a_cleared_cache_is_told_with_the_next_step(vllm_pair: EnginePair) -> None:
    follower = Follower(vllm_pair.prefill_listener)
    follower.predicted([21] * 80)
    num_before = follower.index.counters.num_cleared

    async def scenario() -> int:
        await vllm_pair.run_prefill([21] * 80, ONE, keep_kv=False)
        await vllm_pair.forget_prefixes()
        await vllm_pair.run_prefill([22] * 80, ONE, keep_kv=False)
        await asyncio.sleep(0.3)
        return follower.predicted([21] * 80)

    assert vllm_pair.run(scenario()) == 0
    assert follower.index.counters.num_cleared == num_before + 1
