"""Two real engines: the prefill engine writes KV while it computes."""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.contract.messages import KvSource
from baton.contract.sampling import SamplingSpec
from baton.engine.base import FinishedPrefill
from baton.engine.vllm_settings import VllmEngineSettings, transfer_arguments
from tests.engine.pair import EnginePair, LegResult, begin_prefill

BLOCK, CHUNK = 32, 128
LEASE_S = 3
GREEDY = SamplingSpec(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def vllm_pair(demo_model: Path) -> Iterator[EnginePair]:
    """Both engines load a connector that can be told to misbehave."""
    importlib.import_module("baton.engine.vllm_engine")
    pair = EnginePair(demo_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baton.engine.vllm_engine.transfer_arguments", faulty_transfer_arguments)
        pair.run(
            pair.start(
                transfer="stream", max_num_batched_tokens=CHUNK, kv_lease_s=LEASE_S, kv_cache_bytes=64 << 20
            ),
            timeout_s=240.0,
        )
    yield pair
    pair.close()


def faulty_transfer_arguments(settings: VllmEngineSettings) -> dict[str, Any]:
    return transfer_arguments(settings) | {
        "kv_connector": "FaultyStreamingConnector",
        "kv_connector_module_path": "tests.engine.faulty_connector",
    }


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{num_tokens}/{seed}")
    return [rng.randrange(0, 2000) for _ in range(num_tokens)]


def stream_source(pair: EnginePair, handoff_id: str, num_tokens: int) -> KvSource:
    """What a decode worker has to know before the prefill has run."""
    config = pair.prefill._llm.vllm_config
    host, _, port = pair.prefill_description.transfer_endpoint.partition(":")
    return KvSource(
        lease_s=60.0,
        num_tokens=num_tokens,
        num_bytes=0,
        transfer_params={
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "baton_stream_id": handoff_id,
            "remote_engine_id": config.kv_transfer_config.engine_id,
            "remote_host": host,
            "remote_port": int(port),
            "tp_size": config.parallel_config.tensor_parallel_size,
            "remote_num_tokens": num_tokens,
        },
    )


async def streamed(
    pair: EnginePair, prompt: list[int], *, decode_after_s: float | None = None, fault: str = "none"
) -> tuple[FinishedPrefill, LegResult]:
    """`decode_after_s`: the decode worker comes late. None: it comes first."""
    handoff_id = f"{fault}-{pair.new_handoff_id()}"
    source = stream_source(pair, handoff_id, len(prompt))

    def decode() -> asyncio.Future[LegResult]:
        return pair.begin_decode(prompt, GREEDY, source, handoff_id)

    decoding = decode() if decode_after_s is None else None
    prefilling = begin_prefill(pair.prefill, pair.prefill_listener, prompt, GREEDY, handoff_id)
    if decoding is None:
        await asyncio.sleep(decode_after_s or 0.0)
        decoding = decode()
    finished, result = await asyncio.gather(prefilling, decoding)
    assert isinstance(finished, FinishedPrefill), finished.error
    return finished, result


def expected_tokens(pair: EnginePair, prompt: list[int]) -> list[int]:
    result = pair.run(pair.colocated(prompt, GREEDY))
    pair.run(pair.forget_prefixes())
    return result.token_ids


@pytest.mark.parametrize("num_tokens", [5, BLOCK, CHUNK, CHUNK + 1, 5 * CHUNK + 7])
def test_streamed_output_equals_a_colocated_run(vllm_pair: EnginePair, num_tokens: int) -> None:
    prompt = random_prompt(num_tokens)
    expected = expected_tokens(vllm_pair, prompt)
    _, result = vllm_pair.run(streamed(vllm_pair, prompt), timeout_s=40.0)
    assert result.error is None
    assert result.token_ids == expected
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
    finished, result = vllm_pair.run(streamed(vllm_pair, prompt), timeout_s=40.0)
    assert result.error is None
    assert result.token_ids == expected
    if side == "prefill":
        assert finished.delta.num_cached_tokens == num_cached
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
