"""Two real engines: what a prefill worker and a decode worker do together."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time

import msgspec
import pytest

from baton.contract.lifecycle import WorkerRole
from baton.contract.sampling import SamplingSpec, StructuredOutput
from baton.engine.base import FinishedPrefill
from tests.engine.pair import (
    LEASE_MARGIN_S,
    LEASE_S,
    EnginePair,
    LegResult,
    begin_decode,
    begin_prefill,
)

BLOCK = 32
GREEDY = SamplingSpec(max_tokens=12, temperature=0.0, ignore_eos=True)
"""The demo model's own end token would end some sequences early."""

FIRST_TOKEN_BY = pytest.mark.parametrize(
    "first_token_by", [WorkerRole.PREFILL, WorkerRole.DECODE], ids=["first-by-prefill", "first-by-decode"]
)


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{num_tokens}/{seed}")
    return [rng.randrange(0, 2000) for _ in range(num_tokens)]


def largest_difference(ours: LegResult, theirs: LegResult) -> float:
    """Between the log probabilities of the sampled tokens."""
    assert len(ours.logprobs) == len(theirs.logprobs)
    return max(
        abs(mine[0].logprob - other[0].logprob)
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True)
    )


def test_abort_while_the_decode_worker_fetches(vllm_pair: EnginePair) -> None:
    """Aborted at every moment between dispatch and first token: always free again on both sides. Before
    all others in this file: the two engines have not connected yet, which takes steps of both."""

    async def scenario(pause_s: float, handoff_id: str) -> LegResult:
        prompt = random_prompt(640, seed=12)
        finished = await vllm_pair.run_prefill(prompt, GREEDY, handoff_id=handoff_id)
        assert isinstance(finished, FinishedPrefill)
        sampling = SamplingSpec(max_tokens=1000, temperature=0.0, ignore_eos=True)
        done = vllm_pair.begin_decode(
            [*prompt, *finished.delta.token_ids], sampling, finished.kv_source, handoff_id
        )
        await asyncio.sleep(pause_s)
        vllm_pair.decode.abort(handoff_id)
        vllm_pair.prefill.abort(handoff_id)
        return await done

    for step in range(12):
        vllm_pair.run(vllm_pair.forget_prefixes())
        result = vllm_pair.run(scenario(step * 0.001, f"abort-fetch-{step}"))
        assert result.error is not None
        assert result.error.code == "aborted"
        vllm_pair.run(vllm_pair.wait_until_free())


@FIRST_TOKEN_BY
@pytest.mark.parametrize(
    "num_tokens", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK - 1, 5 * BLOCK, 700, 2000]
)
def test_greedy_output_equals_a_colocated_run(
    vllm_pair: EnginePair, num_tokens: int, first_token_by: WorkerRole
) -> None:
    prompt = random_prompt(num_tokens)
    sampling = msgspec.structs.replace(GREEDY, logprobs=3)
    expected = vllm_pair.run(vllm_pair.colocated(prompt, sampling))
    vllm_pair.run(vllm_pair.forget_prefixes())
    finished, result = vllm_pair.run(vllm_pair.handoff(prompt, sampling, first_token_by=first_token_by))
    assert result.token_ids == expected.token_ids
    assert result.text == expected.text
    assert largest_difference(result, expected) < 1e-4
    assert finished.kv_source is not None
    assert finished.kv_source.num_tokens == num_tokens
    num_blocks = -(-num_tokens // BLOCK)
    assert (
        finished.kv_source.num_bytes == num_blocks * vllm_pair.prefill_description.capacity.kv_bytes_per_block
    )


@FIRST_TOKEN_BY
@pytest.mark.parametrize("num_tokens", [BLOCK, 3 * BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("num_cached", [0, BLOCK, 2 * BLOCK, 10 * BLOCK], ids="cached-{}".format)
def test_prefix_hits_on_the_decode_worker_fetch_only_the_rest(
    vllm_pair: EnginePair, num_tokens: int, num_cached: int, first_token_by: WorkerRole
) -> None:
    prompt = random_prompt(num_tokens, seed=1)
    expected = vllm_pair.run(vllm_pair.colocated(prompt, GREEDY))
    vllm_pair.run(vllm_pair.forget_prefixes())
    if num_cached:
        vllm_pair.run(vllm_pair.run_decode(prompt[:num_cached], GREEDY))
    before = vllm_pair.decode.load()
    _, result = vllm_pair.run(vllm_pair.handoff(prompt, GREEDY, first_token_by=first_token_by))
    after = vllm_pair.decode.load()
    assert result.token_ids == expected.token_ids
    # The last block of the prompt proper is only a hit if a token follows it.
    num_matchable = num_tokens if first_token_by is WorkerRole.PREFILL else num_tokens - 1
    num_hit_blocks = min(num_cached, num_tokens, num_matchable) // BLOCK
    num_fetched_blocks = -(-num_tokens // BLOCK) - num_hit_blocks
    fetched_bytes = after.num_kv_bytes_received - before.num_kv_bytes_received
    assert fetched_bytes == num_fetched_blocks * vllm_pair.decode_description.capacity.kv_bytes_per_block
    vllm_pair.run(vllm_pair.wait_until_free())


def test_a_repeated_prompt_needs_no_transfer(vllm_pair: EnginePair) -> None:
    prompt = random_prompt(2 * BLOCK, seed=2)
    _, first = vllm_pair.run(vllm_pair.handoff(prompt, GREEDY))
    before = vllm_pair.decode.load()
    _, second = vllm_pair.run(vllm_pair.handoff(prompt, GREEDY))
    assert second.token_ids == first.token_ids
    assert vllm_pair.decode.load().num_kv_bytes_received == before.num_kv_bytes_received
    vllm_pair.run(vllm_pair.wait_until_free())


def test_changing_any_one_block_changes_the_answer(vllm_pair: EnginePair) -> None:
    """Otherwise no comparison of outputs would prove that all KV arrived."""
    prompt = random_prompt(24 * BLOCK, seed=3)
    original = vllm_pair.run(vllm_pair.colocated(prompt, msgspec.structs.replace(GREEDY, logprobs=0)))
    assert len(set(original.token_ids)) > len(original.token_ids) // 2
    for block in range(24):
        changed = list(prompt)
        changed[block * BLOCK + 7] = (changed[block * BLOCK + 7] + 11) % 2000
        answer = vllm_pair.run(vllm_pair.colocated(changed, msgspec.structs.replace(GREEDY, logprobs=0)))
        same_tokens = answer.token_ids == original.token_ids
        assert not same_tokens or largest_difference(answer, original) > 1e-3, f"block {block}"


@FIRST_TOKEN_BY
def test_seeded_sampling_equals_a_colocated_run(vllm_pair: EnginePair, first_token_by: WorkerRole) -> None:
    if first_token_by is WorkerRole.PREFILL:
        pytest.skip(
            "a seed's random stream starts anew on the decode worker: the decode worker must sample all"
        )
    sampling = SamplingSpec(max_tokens=20, temperature=0.9, top_p=0.95, top_k=50, seed=7, ignore_eos=True)
    prompt = random_prompt(100, seed=4)
    expected = vllm_pair.run(vllm_pair.colocated(prompt, sampling))
    _, result = vllm_pair.run(vllm_pair.handoff(prompt, sampling, first_token_by=first_token_by))
    assert result.token_ids == expected.token_ids


def test_penalties_and_bias_equal_a_colocated_run_when_decode_samples_all(vllm_pair: EnginePair) -> None:
    sampling = SamplingSpec(
        max_tokens=20, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3,
        logit_bias={17: 2.0}, ignore_eos=True, min_tokens=5,
    )  # fmt: skip
    prompt = random_prompt(75, seed=5)
    expected = vllm_pair.run(vllm_pair.colocated(prompt, sampling))
    _, result = vllm_pair.run(vllm_pair.handoff(prompt, sampling, first_token_by=WorkerRole.DECODE))
    assert result.token_ids == expected.token_ids


def test_structured_output(vllm_pair: EnginePair) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}
    by_schema = SamplingSpec(
        max_tokens=60, temperature=0.0, structured_output=StructuredOutput(json_schema=schema)
    )
    by_regex = SamplingSpec(
        max_tokens=20, temperature=0.0, structured_output=StructuredOutput(regex="[0-9]{3}-[a-z]{2}")
    )
    prompt = random_prompt(40, seed=6)
    _, result = vllm_pair.run(vllm_pair.handoff(prompt, by_regex, first_token_by=WorkerRole.DECODE))
    assert re.fullmatch("[0-9]{3}-[a-z]{2}", result.text)
    _, result = vllm_pair.run(vllm_pair.handoff(prompt, by_schema, first_token_by=WorkerRole.DECODE))
    assert result.last is not None
    if result.last.finish_reason == "stop":
        assert isinstance(json.loads(result.text)["n"], bool)


def test_logprobs_put_the_sampled_token_first(vllm_pair: EnginePair) -> None:
    sampling = SamplingSpec(
        max_tokens=6, temperature=1.0, seed=3, logprobs=4, prompt_logprobs=2, ignore_eos=True
    )
    finished, result = vllm_pair.run(vllm_pair.handoff(random_prompt(40, seed=7), sampling))
    assert [position[0].token_id for position in result.logprobs] == result.token_ids
    for position in result.logprobs:
        ranks = [entry.rank or 0 for entry in position[1:]]
        assert ranks == sorted(ranks)
        assert len(position) in (4, 5)
    assert finished.prompt_logprobs is not None
    assert len(finished.prompt_logprobs) == 40
    assert finished.prompt_logprobs[0] is None


def test_a_batch_is_told_in_one_call_per_step(vllm_pair: EnginePair) -> None:
    async def batch() -> list[int]:
        sampling = SamplingSpec(max_tokens=40, temperature=0.0, ignore_eos=True)
        vllm_pair.decode_listener.step_sizes.clear()
        await asyncio.gather(*(vllm_pair.run_decode(random_prompt(20, seed), sampling) for seed in range(8)))
        return list(vllm_pair.decode_listener.step_sizes)

    sizes = vllm_pair.run(batch())
    # 8 legs x 40 tokens; all 8 run together but for the first and last few steps.
    assert sum(sizes) == 320
    assert sizes.count(8) >= 30
    assert len(sizes) <= 50


# ── ends ──────────────────────────────────────────────────────────────────────────────────────


def first_greedy_token(pair: EnginePair, prompt: list[int]) -> tuple[int, str]:
    result = pair.run(pair.run_decode(prompt, msgspec.structs.replace(GREEDY, max_tokens=1)))
    return result.token_ids[0], result.text


@pytest.mark.parametrize("stop_by", ["token", "string"])
def test_a_first_token_that_ends_the_sequence_holds_nothing(vllm_pair: EnginePair, stop_by: str) -> None:
    prompt = random_prompt(100, seed=8)
    token_id, text = first_greedy_token(vllm_pair, prompt)
    sampling = {
        "token": msgspec.structs.replace(GREEDY, stop_token_ids=[token_id]),
        "string": msgspec.structs.replace(GREEDY, stop=[text.strip()]),
    }[stop_by]
    finished = vllm_pair.run(vllm_pair.run_prefill(prompt, sampling))
    assert isinstance(finished, FinishedPrefill)
    assert finished.kv_source is None
    assert finished.delta.finish_reason == "stop"
    assert finished.delta.stop_reason == {"token": token_id, "string": text.strip()}[stop_by]
    vllm_pair.run(vllm_pair.wait_until_free())  # far sooner than the lease


def test_a_leg_that_keeps_nothing_holds_nothing(vllm_pair: EnginePair) -> None:
    sampling = msgspec.structs.replace(GREEDY, max_tokens=1)
    finished = vllm_pair.run(vllm_pair.run_prefill(random_prompt(100), sampling, keep_kv=False))
    assert isinstance(finished, FinishedPrefill)
    assert finished.kv_source is None
    assert finished.delta.finish_reason == "length"
    vllm_pair.run(vllm_pair.wait_until_free())


def test_max_tokens_of_one_is_held_if_somebody_goes_on(vllm_pair: EnginePair) -> None:
    """That is how the decode worker gets a prompt whose first token it samples itself."""
    sampling = msgspec.structs.replace(GREEDY, max_tokens=1)
    finished = vllm_pair.run(vllm_pair.run_prefill(random_prompt(100), sampling, handoff_id="one"))
    assert isinstance(finished, FinishedPrefill)
    assert finished.kv_source is not None
    assert finished.delta.finish_reason is None
    vllm_pair.run(free_hold(vllm_pair, "one"))
    vllm_pair.run(vllm_pair.wait_until_free())


def test_stop_string_across_decode_tokens(vllm_pair: EnginePair) -> None:
    prompt = random_prompt(64, seed=9)
    expected = vllm_pair.run(vllm_pair.colocated(prompt, GREEDY))
    stop = expected.text[len(expected.text) // 2 :][:4]
    sampling = msgspec.structs.replace(GREEDY, stop=[stop])
    _, result = vllm_pair.run(vllm_pair.handoff(prompt, sampling, first_token_by=WorkerRole.DECODE))
    assert result.text == expected.text[: expected.text.index(stop)]
    assert result.last is not None
    assert (result.last.finish_reason, result.last.stop_reason) == ("stop", stop)
    vllm_pair.run(vllm_pair.wait_until_free())


@pytest.mark.parametrize(
    ("prompt", "code"),
    [([], "invalid_request"), ([1] * 2048, "context_length_exceeded"), ([999_999], "invalid_request")],
    ids=["empty", "too-long", "no-such-token"],
)
def test_bad_prompts_fail_their_leg_only(vllm_pair: EnginePair, prompt: list[int], code: str) -> None:
    for result in (
        vllm_pair.run(vllm_pair.run_decode(prompt, GREEDY)),
        vllm_pair.run(vllm_pair.run_prefill(prompt, GREEDY)),
    ):
        assert isinstance(result, LegResult)
        assert result.error is not None
        assert result.error.code == code
    assert vllm_pair.run(vllm_pair.run_decode([1, 2, 3], GREEDY)).error is None


def test_bad_sampling_fails_its_leg_only(vllm_pair: EnginePair) -> None:
    sampling = SamplingSpec(max_tokens=5, structured_output=StructuredOutput(regex="(["))
    result = vllm_pair.run(vllm_pair.run_decode([1, 2, 3], sampling))
    assert result.error is not None
    assert result.error.code == "invalid_request"


# ── aborts ────────────────────────────────────────────────────────────────────────────────────


def test_abort_while_decoding(vllm_pair: EnginePair) -> None:
    async def scenario() -> LegResult:
        sampling = SamplingSpec(max_tokens=1500, temperature=0.0, ignore_eos=True)
        done = vllm_pair.begin_decode(random_prompt(100), sampling, None, "abort-decode")
        await vllm_pair.decode_listener.first_tokens("abort-decode")
        vllm_pair.decode.abort("abort-decode")
        return await done

    result = vllm_pair.run(scenario())
    assert result.error is not None
    assert result.error.code == "aborted"
    vllm_pair.run(vllm_pair.wait_until_free())


def test_abort_of_a_prefill_at_once(vllm_pair: EnginePair) -> None:
    async def scenario() -> FinishedPrefill | LegResult:
        leg = asyncio.ensure_future(
            vllm_pair.run_prefill(random_prompt(2000, seed=10), GREEDY, handoff_id="abort-prefill")
        )
        await asyncio.sleep(0)
        vllm_pair.prefill.abort("abort-prefill")
        return await leg

    result = vllm_pair.run(scenario())
    assert isinstance(result, LegResult)
    assert result.error is not None
    assert result.error.code == "aborted"
    vllm_pair.run(vllm_pair.wait_until_free())


def test_abort_of_a_finished_prefill_gives_its_hold_back(vllm_pair: EnginePair) -> None:
    """
    1. prefill ends, its KV is held: the blocks are in use
    2. abort: they are free long before the lease ends; a second abort is ignored
    """
    finished = vllm_pair.run(vllm_pair.run_prefill(random_prompt(320, seed=11), GREEDY, handoff_id="held"))
    assert isinstance(finished, FinishedPrefill)
    assert finished.kv_source is not None
    assert LEASE_S - 1 < finished.kv_source.lease_s <= LEASE_S

    async def blocks_in_use() -> int:
        await asyncio.sleep(0.05)
        return vllm_pair.num_blocks()[0] - vllm_pair.num_free_blocks()[0]

    assert vllm_pair.run(blocks_in_use()) == 10  # 320 / 32

    async def abort() -> None:
        vllm_pair.prefill.abort("held")
        vllm_pair.prefill.abort("held")

    started_s = time.monotonic()
    vllm_pair.run(abort())
    vllm_pair.run(vllm_pair.wait_until_free())
    assert time.monotonic() - started_s < LEASE_S / 2


# ── leases ────────────────────────────────────────────────────────────────────────────────────


def test_a_late_hand_off_is_refused(vllm_pair: EnginePair) -> None:
    """The time left is inside the margin: nothing is fetched, the leg fails by this engine's policy."""
    prompt = random_prompt(200, seed=13)
    finished = vllm_pair.run(vllm_pair.run_prefill(prompt, GREEDY, handoff_id="late"))
    assert isinstance(finished, FinishedPrefill)
    assert finished.kv_source is not None
    late = msgspec.structs.replace(finished.kv_source, lease_s=LEASE_MARGIN_S * 0.9)
    before = vllm_pair.decode.load()
    result = vllm_pair.run(
        vllm_pair.run_decode([*prompt, *finished.delta.token_ids], GREEDY, late, handoff_id="late")
    )
    assert result.error is not None
    assert (result.error.code, result.error.phase) == ("kv_transfer_failed", "handing_off")
    after = vllm_pair.decode.load()
    assert after.num_kv_bytes_received == before.num_kv_bytes_received
    assert after.num_kv_transfer_failures == before.num_kv_transfer_failures + 1
    vllm_pair.run(free_hold(vllm_pair, "late"))
    vllm_pair.run(vllm_pair.wait_until_free())


def test_an_engine_set_to_recompute_answers_all_the_same(vllm_pair: EnginePair) -> None:
    """The pair's other engine has that policy, so here the two change places."""
    prompt = random_prompt(200, seed=16)
    expected = vllm_pair.run(vllm_pair.colocated(prompt, GREEDY))

    async def reversed_handoff(lease_s: float | None, handoff_id: str) -> LegResult:
        finished = await begin_prefill(
            vllm_pair.decode, vllm_pair.decode_listener, prompt, GREEDY, handoff_id
        )
        assert isinstance(finished, FinishedPrefill)
        assert finished.kv_source is not None
        source = finished.kv_source
        if lease_s is not None:
            source = msgspec.structs.replace(source, lease_s=lease_s)
        await vllm_pair.prefill._llm.reset_prefix_cache()
        result = await begin_decode(
            vllm_pair.prefill, vllm_pair.prefill_listener, prompt, GREEDY, source, handoff_id
        )
        vllm_pair.decode.abort(handoff_id)
        return result

    before = vllm_pair.prefill.load()
    in_time = vllm_pair.run(reversed_handoff(None, "in-time"))
    after = vllm_pair.prefill.load()
    assert in_time.token_ids == expected.token_ids
    assert after.num_kv_transfers == before.num_kv_transfers + 1
    assert after.num_prefill_tokens_done == before.num_prefill_tokens_done

    too_late = vllm_pair.run(reversed_handoff(0.0, "too-late"))
    later = vllm_pair.prefill.load()
    assert too_late.token_ids == expected.token_ids
    assert later.num_kv_transfers == after.num_kv_transfers
    assert later.num_kv_transfer_failures == after.num_kv_transfer_failures + 1
    vllm_pair.run(vllm_pair.wait_until_free())


def test_the_hold_ends_with_its_lease_and_a_reader_after_it_gets_no_tokens(vllm_pair: EnginePair) -> None:
    """
    1. a prompt's KV is held and its lease runs out
    2. other prompts are computed and overwrite the blocks
    3. the reader comes: it must fail, not decode from another prompt's KV
    """
    prompt = random_prompt(200, seed=14)
    finished = vllm_pair.run(vllm_pair.run_prefill(prompt, GREEDY, handoff_id="expired"))
    assert isinstance(finished, FinishedPrefill)
    assert finished.kv_source is not None
    arrived_s = time.monotonic()
    vllm_pair.run(vllm_pair.wait_until_free(timeout_s=LEASE_S + 3))
    for seed in range(3):
        vllm_pair.run(vllm_pair.run_prefill(random_prompt(1500, seed), GREEDY, keep_kv=False))
    # The owner of the hand-off has subtracted the time it kept it.
    left_s = max(0.0, finished.kv_source.lease_s - (time.monotonic() - arrived_s))
    late = msgspec.structs.replace(finished.kv_source, lease_s=left_s)
    result = vllm_pair.run(vllm_pair.run_decode([*prompt, *finished.delta.token_ids], GREEDY, late))
    assert result.token_ids == []
    assert result.error is not None
    assert result.error.code == "kv_transfer_failed"


async def free_hold(pair: EnginePair, handoff_id: str) -> None:
    pair.prefill.abort(handoff_id)


def test_prefill_engine_that_does_not_answer(vllm_pair: EnginePair) -> None:
    """A hand-off that names a port where nobody listens fails in bounded time."""
    prompt = random_prompt(200, seed=15)
    finished = vllm_pair.run(vllm_pair.run_prefill(prompt, GREEDY, handoff_id="nobody"))
    assert isinstance(finished, FinishedPrefill)
    assert finished.kv_source is not None
    params = {**finished.kv_source.transfer_params, "remote_port": 1, "remote_engine_id": "nobody"}
    nobody = msgspec.structs.replace(finished.kv_source, transfer_params=params)
    started_s = time.monotonic()
    result = vllm_pair.run(vllm_pair.run_decode([*prompt, *finished.delta.token_ids], GREEDY, nobody))
    assert result.error is not None
    assert result.error.code == "kv_transfer_failed"
    assert time.monotonic() - started_s < LEASE_S
    vllm_pair.run(free_hold(vllm_pair, "nobody"))
    vllm_pair.run(vllm_pair.wait_until_free())


def test_a_request_on_which_vllm_breaks_leaves_nothing_behind(
    vllm_pair: EnginePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an exception that nobody foresaw; the worker that called tells. The same id may come again."""

    processor = vllm_pair.prefill._llm.input_processor
    with monkeypatch.context() as patch:
        patch.setattr(processor, "process_inputs", lambda *_, **__: dict[str, None]()["unforeseen"])
        with pytest.raises(KeyError):
            vllm_pair.run(vllm_pair.run_prefill(random_prompt(40), GREEDY, handoff_id="breaks"))
    assert vllm_pair.prefill._legs == {}
    finished = vllm_pair.run(
        vllm_pair.run_prefill(random_prompt(40), GREEDY, handoff_id="breaks", keep_kv=False)
    )
    assert isinstance(finished, FinishedPrefill)
