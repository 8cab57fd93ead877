"""Two real engines that sign their KV, and transfers that go wrong: corrupted, refused, stuck, late.

Whatever is done to a transfer, its request gets the right tokens or the typed error, the engines go on, and
nothing stays held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.handoffs import Way, all_handed_off, answers_alone, handed_off
from tests.engine.pair import EnginePair
from tests.engine.streams import CHUNK, GREEDY, faulty_streaming_pair, random_prompt, streamed

BLOCK = 32
LEASE_S = 4
PULL_TIMEOUT_S = 1.0

WAYS = pytest.mark.parametrize("way", ["pull", "stream"])


@pytest.fixture(scope="module")
def vllm_pair(demo_model: Path) -> Iterator[EnginePair]:
    with faulty_streaming_pair(
        demo_model, is_kv_digest_enabled=True, kv_lease_s=LEASE_S, kv_pull_timeout_s=PULL_TIMEOUT_S
    ) as pair:
        yield pair


def num_mismatches(pair: EnginePair) -> int:
    return pair.decode.load().num_kv_digest_mismatches


async def wait_for_mismatches(pair: EnginePair, number: int) -> None:
    """An engine's counters follow its outputs."""
    for _ in range(100):
        if num_mismatches(pair) >= number:
            break
        await asyncio.sleep(0.02)
    assert num_mismatches(pair) == number


@WAYS
def test_signed_kv_raises_no_false_alarm(vllm_pair: EnginePair, way: Way) -> None:
    """Unique prompts of all lengths, many at once; some begin with what one of the engines has already."""
    prompts = [random_prompt(20 + 13 * number, seed=40) for number in range(28)]
    expected = vllm_pair.run(answers_alone(vllm_pair, prompts))
    before = num_mismatches(vllm_pair)
    vllm_pair.run(vllm_pair.run_decode(prompts[20][: 4 * BLOCK], GREEDY))
    vllm_pair.run(vllm_pair.run_prefill(prompts[21][: 5 * BLOCK], GREEDY, keep_kv=False))
    results = vllm_pair.run(all_handed_off(vllm_pair, way, prompts, "none", at_once=28), timeout_s=100.0)
    assert [result.error for result in results] == [None] * len(prompts)
    assert [result.token_ids for result in results] == expected
    assert num_mismatches(vllm_pair) == before
    vllm_pair.run(vllm_pair.wait_until_free(LEASE_S + 4.0))


@pytest.mark.parametrize("writes", ["layer", "end"])
def test_signatures_come_with_the_last_write_whenever_it_is(vllm_pair: EnginePair, writes: str) -> None:
    """Layer by layer the KV of a step is on its way before its blocks can be signed."""
    prompt = random_prompt(3 * CHUNK + 7, seed=45)
    (expected,) = vllm_pair.run(answers_alone(vllm_pair, [prompt]))
    before = num_mismatches(vllm_pair)
    for after_s in (None, 0.1):
        _, result = vllm_pair.run(
            streamed(vllm_pair, prompt, writes=writes, decode_after_s=after_s), timeout_s=60.0
        )
        assert result.error is None
        assert result.token_ids == expected
        vllm_pair.run(vllm_pair.forget_prefixes())
    assert num_mismatches(vllm_pair) == before
    vllm_pair.run(vllm_pair.wait_until_free(LEASE_S + 4.0))


@WAYS
@pytest.mark.parametrize("fault", ["wrong", "flip"])
def test_a_planted_corruption_is_caught_every_time(vllm_pair: EnginePair, way: Way, fault: str) -> None:
    """A block from a wrong place, with its own signature, and a single bit: no token is sampled from it."""
    vllm_pair.run(vllm_pair.forget_prefixes())
    before = num_mismatches(vllm_pair)
    for seed in range(5):
        prompt = random_prompt(CHUNK + 40 * seed + 3, seed=50 + seed)
        result = vllm_pair.run(handed_off(vllm_pair, way, prompt, fault), timeout_s=60.0)
        assert result.token_ids == []
        assert result.error is not None and result.error.code == "kv_transfer_failed"
    vllm_pair.run(wait_for_mismatches(vllm_pair, before + 5))
    again = random_prompt(CHUNK + 3, seed=50)
    (expected,) = vllm_pair.run(answers_alone(vllm_pair, [again]))
    assert vllm_pair.run(handed_off(vllm_pair, way, again, "none"), timeout_s=60.0).token_ids == expected
    vllm_pair.run(vllm_pair.wait_until_free(LEASE_S + 4.0))


@WAYS
def test_transfers_that_fail_leave_right_answers_and_errors(vllm_pair: EnginePair, way: Way) -> None:
    """
    1. every fourth transfer is refused, fails, hangs for ever, or is told late
    2. some requests get the typed error, all others their right tokens; nobody waits
    3. both engines go on, and nothing is held
    """
    prompts = [random_prompt(CHUNK + 9 * number, seed=60) for number in range(24)]
    expected = vllm_pair.run(answers_alone(vllm_pair, prompts))
    results = vllm_pair.run(all_handed_off(vllm_pair, way, prompts, "unlucky4", at_once=6), timeout_s=120.0)
    errors = [result.error.code for result in results if result.error is not None]
    assert set(errors) == {"kv_transfer_failed"}
    assert len(errors) < len(prompts)
    for result, tokens in zip(results, expected, strict=True):
        assert result.token_ids == ([] if result.error is not None else tokens)
    vllm_pair.run(vllm_pair.wait_until_free(LEASE_S + 10.0))
    results = vllm_pair.run(all_handed_off(vllm_pair, way, prompts[:4], "none", at_once=4), timeout_s=60.0)
    assert [result.token_ids for result in results] == expected[:4]
    vllm_pair.run(vllm_pair.wait_until_free(LEASE_S + 4.0))
