"""Two real engines: the prefill engine writes KV while it computes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from baton.contract.sampling import SamplingSpec
from baton.engine.base import FinishedPrefill
from tests.engine.pair import EnginePair, LegResult, begin_prefill
from tests.engine.streams import CHUNK, GREEDY, faulty_streaming_pair, random_prompt, stream_source, streamed

BLOCK = 32
LEASE_S = 3


@pytest.fixture(scope="module")
def vllm_pair(demo_model: Path) -> Iterator[EnginePair]:
    with faulty_streaming_pair(demo_model, kv_lease_s=LEASE_S) as pair:
        yield pair


def expected_tokens(pair: EnginePair, prompt: list[int]) -> list[int]:
    result = pair.run(pair.colocated(prompt, GREEDY))
    pair.run(pair.forget_prefixes())
    return result.token_ids


@pytest.mark.parametrize("num_tokens", [5, BLOCK, CHUNK, CHUNK + 1, 5 * CHUNK + 7])
def test_streamed_output_equals_a_colocated_run(vllm_pair: EnginePair, num_tokens: int) -> None:
    prompt = random_prompt(num_tokens)
    expected = expected_tokens(vllm_pair, prompt)
    for has_first_token in (True, False):
        _, result = vllm_pair.run(
            streamed(vllm_pair, prompt, has_first_token=has_first_token), timeout_s=40.0
        )
        assert result.error is None
        assert result.token_ids == expected
        vllm_pair.run(vllm_pair.wait_until_free())
        vllm_pair.run(vllm_pair.forget_prefixes())


def test_the_first_token_is_the_prefill_workers_own(vllm_pair: EnginePair) -> None:
    """Drawn at random over there: the decode worker could not have guessed it."""
    wild = msgspec.structs.replace(GREEDY, temperature=2.0)
    for number in range(6):
        prompt = random_prompt(CHUNK + 7 * number, seed=40)
        finished, result = vllm_pair.run(streamed(vllm_pair, prompt, sampling=wild), timeout_s=40.0)
        assert result.error is None
        assert len(result.token_ids) == GREEDY.max_tokens
        assert result.token_ids[:1] == finished.delta.token_ids
        assert result.text.startswith(finished.delta.text)


@pytest.mark.parametrize(
    "case", ["stops-at-first", "stops-at-second", "min-tokens", "two-tokens", "repetition", "last-position"]
)
def test_answers_end_and_read_as_colocated_ones(vllm_pair: EnginePair, case: str) -> None:
    """The token from the prefill worker is prompt to the one half of vLLM and output to the other; what
    depends on counting either must not show it."""
    prompt = random_prompt(2 * CHUNK + 3, seed=41)
    first, second, *_ = expected_tokens(vllm_pair, prompt)
    plain = SamplingSpec(max_tokens=12, temperature=0.0)
    sampling = {
        "stops-at-first": msgspec.structs.replace(plain, stop_token_ids=(first,)),
        "stops-at-second": msgspec.structs.replace(plain, stop_token_ids=(second,)),
        "min-tokens": msgspec.structs.replace(plain, stop_token_ids=(first, second), min_tokens=3),
        "two-tokens": msgspec.structs.replace(plain, max_tokens=2),
        "repetition": msgspec.structs.replace(plain, repetition_penalty=1.4),
        "last-position": plain,
    }[case]
    if case == "last-position":  # room for three tokens more
        prompt = random_prompt(2048 - 3, seed=41)
    expected = vllm_pair.run(vllm_pair.colocated(prompt, sampling))
    vllm_pair.run(vllm_pair.forget_prefixes())
    finished, result = vllm_pair.run(streamed(vllm_pair, prompt, sampling=sampling), timeout_s=60.0)
    assert (result.token_ids, result.text) == (expected.token_ids, expected.text)
    assert result.last is not None and expected.last is not None
    assert result.last.finish_reason == expected.last.finish_reason
    assert result.last.stop_reason == expected.last.stop_reason
    if case == "stops-at-first":
        assert finished.delta.finish_reason == "stop"
    vllm_pair.run(vllm_pair.wait_until_free())
    vllm_pair.run(vllm_pair.forget_prefixes())


@pytest.mark.parametrize("writes", ["layer", "end"])
def test_when_it_is_written_does_not_change_the_answer(vllm_pair: EnginePair, writes: str) -> None:
    """Layer by layer some arrive before the step has ended; a late registration catches up."""
    prompt = random_prompt(4 * CHUNK + 5, seed=11)
    expected = expected_tokens(vllm_pair, prompt)
    for after_s in (None, 0.1):
        _, result = vllm_pair.run(
            streamed(vllm_pair, prompt, writes=writes, decode_after_s=after_s), timeout_s=40.0
        )
        assert result.error is None
        assert result.token_ids == expected
        vllm_pair.run(vllm_pair.forget_prefixes())
    vllm_pair.run(vllm_pair.wait_until_free())


def test_four_at_once(vllm_pair: EnginePair) -> None:
    prompts = [random_prompt(3 * CHUNK + 11 * number, seed=1) for number in range(4)]
    expected = [expected_tokens(vllm_pair, prompt) for prompt in prompts]

    async def all_at_once() -> list[tuple[FinishedPrefill, LegResult]]:
        return await asyncio.gather(*[streamed(vllm_pair, prompt) for prompt in prompts])

    results = vllm_pair.run(all_at_once(), timeout_s=60.0)
    assert [result.token_ids for _, result in results] == expected
    vllm_pair.run(vllm_pair.wait_until_free())


def test_one_block_from_a_wrong_place_changes_the_answer(vllm_pair: EnginePair) -> None:
    """Otherwise equal tokens would not prove that all KV arrived where it belongs."""
    prompt = random_prompt(3 * CHUNK, seed=2)
    expected = expected_tokens(vllm_pair, prompt)
    _, result = vllm_pair.run(streamed(vllm_pair, prompt, fault="wrong"), timeout_s=40.0)
    assert result.error is None
    assert result.token_ids != expected
    vllm_pair.run(vllm_pair.forget_prefixes())


@pytest.mark.parametrize("after_s", [0.1, 0.6, 1.5], ids="after-{}s".format)
def test_a_decode_worker_that_comes_late_catches_up(vllm_pair: EnginePair, after_s: float) -> None:
    """During prefill and after it; the prefill engine holds what nobody has taken."""
    prompt = random_prompt(6 * CHUNK + 3, seed=3)
    expected = expected_tokens(vllm_pair, prompt)
    _, result = vllm_pair.run(streamed(vllm_pair, prompt, decode_after_s=after_s), timeout_s=40.0)
    assert result.error is None
    assert result.token_ids == expected
    vllm_pair.run(vllm_pair.wait_until_free())


def test_a_decode_worker_that_comes_after_the_lease_gets_an_error_not_text(vllm_pair: EnginePair) -> None:
    prompt = random_prompt(2 * CHUNK, seed=4)
    _, result = vllm_pair.run(streamed(vllm_pair, prompt, decode_after_s=LEASE_S + 1.0), timeout_s=40.0)
    assert result.token_ids == []
    assert result.error is not None
    assert result.error.code == "kv_transfer_failed"
    vllm_pair.run(vllm_pair.wait_until_free())


@pytest.mark.parametrize("num_cached", [BLOCK, 4 * BLOCK, 10 * BLOCK])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_prefix_hits_on_either_side(vllm_pair: EnginePair, side: str, num_cached: int) -> None:
    """What the decode worker has is not sent; what the prefill worker had is."""
    prompt = random_prompt(3 * CHUNK + 9, seed=5)
    expected = expected_tokens(vllm_pair, prompt)
    if side == "decode":
        vllm_pair.run(vllm_pair.run_decode(prompt[:num_cached], GREEDY))
    else:
        vllm_pair.run(vllm_pair.run_prefill(prompt[:num_cached], GREEDY, keep_kv=False))
    before = vllm_pair.decode.load()
    finished, result = vllm_pair.run(streamed(vllm_pair, prompt), timeout_s=40.0)
    after = vllm_pair.decode.load()
    assert result.error is None
    assert result.token_ids == expected
    num_blocks = -(-len(prompt) // BLOCK)
    if side == "prefill":
        assert finished.delta.num_cached_tokens == num_cached
    else:
        num_blocks -= num_cached // BLOCK
    received_bytes = after.num_kv_bytes_received - before.num_kv_bytes_received
    assert received_bytes == num_blocks * vllm_pair.decode_description.capacity.kv_bytes_per_block
    vllm_pair.run(vllm_pair.forget_prefixes())
    vllm_pair.run(vllm_pair.wait_until_free())


def test_a_decode_worker_that_aborts_while_it_is_written_to(vllm_pair: EnginePair) -> None:
    prompt = random_prompt(8 * CHUNK, seed=6)

    async def abort_midway() -> LegResult:
        handoff_id = f"slow-{vllm_pair.new_handoff_id()}"
        source = stream_source(vllm_pair, handoff_id, len(prompt))
        decoding = vllm_pair.begin_decode(prompt, GREEDY, source, handoff_id)
        prefilling = begin_prefill(vllm_pair.prefill, vllm_pair.prefill_listener, prompt, GREEDY, handoff_id)
        await asyncio.sleep(0.4)
        vllm_pair.decode.abort(handoff_id)
        result = await decoding
        vllm_pair.prefill.abort(handoff_id)
        await prefilling
        vllm_pair.prefill.abort(handoff_id)
        return result

    result = vllm_pair.run(abort_midway(), timeout_s=40.0)
    assert result.error is not None
    assert result.error.code == "aborted"
    vllm_pair.run(vllm_pair.wait_until_free())
    assert_next_is_right(vllm_pair)


def test_a_prefill_worker_that_aborts_ends_the_decode_leg(vllm_pair: EnginePair) -> None:
    prompt = random_prompt(8 * CHUNK, seed=7)

    async def abort_midway() -> LegResult:
        handoff_id = f"slow-{vllm_pair.new_handoff_id()}"
        source = stream_source(vllm_pair, handoff_id, len(prompt))
        decoding = vllm_pair.begin_decode(prompt, GREEDY, source, handoff_id)
        prefilling = begin_prefill(vllm_pair.prefill, vllm_pair.prefill_listener, prompt, GREEDY, handoff_id)
        await asyncio.sleep(0.4)
        vllm_pair.prefill.abort(handoff_id)
        await prefilling
        return await decoding

    result = vllm_pair.run(abort_midway(), timeout_s=40.0)
    assert result.token_ids == []
    assert result.error is not None
    assert result.error.code == "kv_transfer_failed"
    vllm_pair.run(vllm_pair.wait_until_free())
    assert_next_is_right(vllm_pair)


def test_a_write_that_fails_fails_the_request(vllm_pair: EnginePair) -> None:
    prompt = random_prompt(4 * CHUNK, seed=8)
    _, result = vllm_pair.run(streamed(vllm_pair, prompt, fault="fail"), timeout_s=40.0)
    assert result.token_ids == []
    assert result.error is not None
    assert result.error.code == "kv_transfer_failed"
    vllm_pair.run(vllm_pair.wait_until_free(LEASE_S + 3.0))
    assert_next_is_right(vllm_pair)


def test_late_decode_workers_and_churn_never_give_wrong_text(vllm_pair: EnginePair) -> None:
    """Delays around the lease, many prompts at once in a small pool: the recipe in which a reader of
    freed blocks gets another prompt's tokens."""
    rng = random.Random(9)
    prompts = [random_prompt(rng.randrange(BLOCK, 3 * CHUNK), seed=100 + number) for number in range(24)]
    expected = [expected_tokens(vllm_pair, prompt) for prompt in prompts]

    async def churn() -> list[tuple[FinishedPrefill, LegResult]]:
        return await asyncio.gather(
            *[
                streamed(vllm_pair, prompt, decode_after_s=rng.uniform(0.0, 2.0 * LEASE_S))
                for prompt in prompts
            ]
        )

    results = [result for _, result in vllm_pair.run(churn(), timeout_s=100.0)]
    answered = [number for number, result in enumerate(results) if result.error is None]
    assert [results[number].token_ids for number in answered] == [expected[number] for number in answered]
    assert answered
    assert len(answered) < len(results), "no decode worker came after a lease: the delays are too short"
    vllm_pair.run(vllm_pair.wait_until_free(LEASE_S + 3.0))


def assert_next_is_right(pair: EnginePair) -> None:
    prompt = random_prompt(2 * CHUNK + 1, seed=99)
    expected = expected_tokens(pair, prompt)
    _, result = pair.run(streamed(pair, prompt), timeout_s=40.0)
    assert result.token_ids == expected


def test_a_client_that_leaves_after_prefill_leaves_nothing_behind(vllm_pair: EnginePair) -> None:
    """Nobody ever registers; the hold is given back before its lease ends."""
    prompt = random_prompt(2 * CHUNK, seed=10)

    async def prefill_and_leave() -> None:
        handoff_id = vllm_pair.new_handoff_id()
        finished = await vllm_pair.run_prefill(prompt, GREEDY, handoff_id=handoff_id)
        assert isinstance(finished, FinishedPrefill)
        vllm_pair.prefill.abort(handoff_id)

    vllm_pair.run(prefill_and_leave())
    vllm_pair.run(vllm_pair.wait_until_free(LEASE_S / 2))
