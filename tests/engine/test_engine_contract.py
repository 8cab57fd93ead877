"""What every engine promises a worker: one set of tests, run on the simulated engine and on vLLM.

A pair of engines (prefill, decode) is started once for all tests of a kind, as a real one takes its
time. Each test uses prompts of its own, so no prefix cache of an earlier test helps it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec
import pytest

from baton.contract.tokens import pack_token_ids
from baton.policy.kv_feed import KvFeeds
from baton.policy.kv_index import KvIndex
from tests.engine.any_pair import (
    BLOCK,
    DEADLINE_S,
    MAX_MODEL_LEN,
    Pair,
    decode_message,
    simulated_engines,
    tokens_of,
    vllm_engines,
)

REAL = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # torch and vLLM warn as they load


@pytest.fixture(scope="module", params=["simulated", pytest.param("vllm", marks=REAL)])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if request.param == "simulated":
        engines = simulated_engines()
    else:
        engines = vllm_engines(str(request.getfixturevalue("demo_model")))
    with asyncio.Runner() as runner:
        pair = Pair(runner, *engines)
        pair.run(pair.start())
        try:
            yield pair
        finally:
            pair.run(pair.stop())


def test_describes_itself(pair: Pair):
    for description in (pair.prefill_is, pair.decode_is):
        assert description.capacity.max_model_len == MAX_MODEL_LEN
        assert description.capacity.num_blocks > 0
        assert description.capacity.kv_bytes_per_block > 0
        assert description.layout.block_size_tokens == BLOCK
        host, _, port = description.transfer_endpoint.rpartition(":")
        assert host and port.isdigit()
        assert description.layout.attention_backend and description.layout.weights
    assert pair.prefill_is.layout == pair.decode_is.layout
    assert pair.prefill_is.transfer_endpoint != pair.decode_is.transfer_endpoint


@pytest.mark.parametrize("num_prompt_tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3])
def test_kv_from_elsewhere_gives_the_tokens_of_one_engine_alone(pair: Pair, num_prompt_tokens: int):
    async def scenario() -> None:
        prompt = pair.new_prompt(num_prompt_tokens)
        alone = tokens_of(await pair.run_decode(prompt))
        assert len(alone) == 8
        finished = await pair.run_prefill(prompt)
        first = finished.delta.token_ids
        assert first == alone[:1]
        assert finished.delta.finish_reason is None
        source = finished.kv_source
        assert source is not None
        assert source.num_tokens == num_prompt_tokens
        num_blocks = -(-num_prompt_tokens // BLOCK)
        assert source.num_bytes == num_blocks * pair.prefill_is.capacity.kv_bytes_per_block
        rest = tokens_of(await pair.run_decode(prompt + first, finished, max_tokens=7))
        assert first + rest == alone
        await pair.all_free()

    pair.run(scenario())


def test_the_decode_engine_can_give_the_first_token(pair: Pair):
    """The prefill engine's own token is thrown away; its KV is held although max_tokens was 1."""

    async def scenario() -> None:
        prompt = pair.new_prompt(2 * BLOCK + 5)
        finished = await pair.run_prefill(prompt, max_tokens=1)
        assert finished.kv_source is not None
        received_before = pair.decode.load().num_kv_bytes_received
        tokens = tokens_of(await pair.run_decode(prompt, finished))
        await pair.all_free()
        received = pair.decode.load().num_kv_bytes_received - received_before
        assert received == finished.kv_source.num_bytes
        assert tokens == tokens_of(await pair.run_decode(prompt))

    pair.run(scenario())


def test_nothing_is_held_when_nobody_will_fetch_it(pair: Pair):
    async def scenario() -> None:
        finished = await pair.run_prefill(pair.new_prompt(40), keep_kv=False, max_tokens=1)
        assert finished.kv_source is None
        assert finished.delta.finish_reason == "length"
        await pair.all_free()

    pair.run(scenario())


def test_aborting_a_finished_prefill_gives_its_blocks_back(pair: Pair):
    async def scenario() -> None:
        finished = await pair.run_prefill(pair.new_prompt(40))
        pair.prefill.abort(finished.delta.handoff_id)
        await pair.all_free()
        assert pair.prefill_heard.ends[finished.delta.handoff_id] == 1

    pair.run(scenario())


def test_abort_ends_a_running_leg_once_and_frees_it(pair: Pair):
    async def scenario() -> None:
        handoff_id = pair.new_id()
        pair.decode.start_decode(decode_message(handoff_id, pair.new_prompt(40), max_tokens=400))
        await pair.decode_heard.until(lambda: pair.decode_heard.deltas(handoff_id))
        pair.decode.abort(handoff_id)
        pair.decode.abort(handoff_id)
        await pair.decode_heard.until(lambda: handoff_id in pair.decode_heard.ends)
        assert pair.decode_heard.failures[handoff_id].code == "aborted"
        await pair.all_free()
        assert pair.decode_heard.ends[handoff_id] == 1

    pair.run(scenario())


def test_abort_of_the_unknown_and_the_finished_is_ignored(pair: Pair):
    async def scenario() -> None:
        deltas = await pair.run_decode(pair.new_prompt(5))
        pair.decode.abort(deltas[0].handoff_id)
        pair.decode.abort("never heard of")
        await pair.run_decode(pair.new_prompt(5))
        assert "never heard of" not in pair.decode_heard.ends
        assert deltas[0].handoff_id not in pair.decode_heard.failures

    pair.run(scenario())


def test_tokens_of_one_step_come_in_one_call(pair: Pair):
    async def scenario() -> None:
        handoff_ids = [pair.new_id() for _ in range(8)]
        first_step = len(pair.decode_heard.steps)
        for handoff_id in handoff_ids:
            pair.decode.start_decode(decode_message(handoff_id, pair.new_prompt(10), max_tokens=40))
        await pair.decode_heard.until(lambda: all(h in pair.decode_heard.ends for h in handoff_ids))
        steps = pair.decode_heard.steps[first_step:]
        assert max(map(len, steps)) == 8
        assert len(steps) <= 80  # 40 if all started together; far from 8 x 40
        assert all(len({delta.handoff_id for delta in step}) == len(step) for step in steps)

    pair.run(scenario())


def test_stops_at_a_token(pair: Pair):
    async def scenario() -> None:
        prompt = pair.new_prompt(10)
        alone = tokens_of(await pair.run_decode(prompt))
        index = next(i for i in range(1, 8) if alone[i] not in alone[:i])
        deltas = await pair.run_decode(prompt, stop_token_ids=[alone[index]])
        assert tokens_of(deltas) == alone[: index + 1]
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", alone[index])

    pair.run(scenario())


def test_stops_at_a_string_without_giving_it_out(pair: Pair):
    async def scenario() -> None:
        prompt = pair.new_prompt(10)
        text = "".join(delta.text for delta in await pair.run_decode(prompt, max_tokens=40))
        stop = text[10:13]
        deltas = await pair.run_decode(prompt, max_tokens=40, stop=[stop])
        assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)

    pair.run(scenario())


def test_a_first_token_that_ends_the_sequence_leaves_nothing_held(pair: Pair):
    async def scenario() -> None:
        prompt = pair.new_prompt(10)
        [first, *_] = tokens_of(await pair.run_decode(prompt))
        finished = await pair.run_prefill(prompt, stop_token_ids=[first])
        assert finished.delta.finish_reason == "stop"
        assert finished.kv_source is None
        await pair.all_free()

    pair.run(scenario())


def test_logprobs_put_the_sampled_token_first(pair: Pair):
    async def scenario() -> None:
        prompt = pair.new_prompt(10)
        deltas = await pair.run_decode(prompt, logprobs=3)
        positions = [position for delta in deltas for position in delta.logprobs or ()]
        assert [position[0].token_id for position in positions] == tokens_of(deltas)
        for position in positions:
            assert len(position) == 3  # greedy: the sampled one is among the best three
            assert [entry.logprob for entry in position] == sorted(
                (e.logprob for e in position), reverse=True
            )
        finished = await pair.run_prefill(prompt, logprobs=3, prompt_logprobs=1, keep_kv=False)
        assert finished.delta.logprobs is not None
        assert [e.token_id for e in finished.delta.logprobs[0]] == [e.token_id for e in positions[0]]
        assert finished.prompt_logprobs is not None
        assert finished.prompt_logprobs[0] is None
        given = [position[0].token_id for position in finished.prompt_logprobs[1:] if position]
        assert given == prompt[1:]

    pair.run(scenario())


@pytest.mark.parametrize(
    ("num_prompt_tokens", "code"),
    [
        pytest.param(0, "invalid_request", id="empty"),
        pytest.param(MAX_MODEL_LEN, "context_length_exceeded", id="too long"),
    ],
)
def test_a_prompt_it_cannot_serve_fails_that_leg_after_the_call(
    pair: Pair, num_prompt_tokens: int, code: str
):
    async def scenario() -> None:
        handoff_id = pair.new_id()
        pair.decode.start_decode(decode_message(handoff_id, [101] * num_prompt_tokens))
        assert handoff_id not in pair.decode_heard.ends  # listeners are not called from inside commands
        await pair.decode_heard.until(lambda: handoff_id in pair.decode_heard.ends)
        assert pair.decode_heard.failures[handoff_id].code == code
        await pair.all_free()

    pair.run(scenario())


def test_kv_is_not_read_after_its_lease(pair: Pair):
    """No time is left: the prompt is computed again (the default policy), with the right answer."""

    async def scenario() -> None:
        prompt = pair.new_prompt(2 * BLOCK)
        finished = await pair.run_prefill(prompt)
        assert finished.kv_source is not None
        failures_before = pair.decode.load().num_kv_transfer_failures
        late = msgspec.structs.replace(finished.kv_source, lease_s=0.0)
        handoff_id = pair.new_id()
        whole_prompt = prompt + finished.delta.token_ids
        pair.decode.start_decode(decode_message(handoff_id, whole_prompt, late, max_tokens=7))
        await pair.decode_heard.until(lambda: handoff_id in pair.decode_heard.ends)
        tokens = finished.delta.token_ids + pair.decode_heard.tokens(handoff_id)
        assert tokens == tokens_of(await pair.run_decode(prompt))
        pair.prefill.abort(finished.delta.handoff_id)
        await pair.all_free()
        assert pair.decode.load().num_kv_transfer_failures > failures_before

    pair.run(scenario())


def test_times_and_loads_are_plausible(pair: Pair):
    async def scenario() -> None:
        before = pair.prefill.load().num_prefill_tokens_done
        finished = await pair.run_prefill(pair.new_prompt(100), keep_kv=False)
        assert 0 <= finished.queue_s < DEADLINE_S
        assert 0 <= finished.prefill_s < DEADLINE_S
        await pair.all_free()
        load = pair.prefill.load()
        assert load.num_prefill_tokens_done == before + 100
        assert (load.num_running, load.num_waiting) == (0, 0)

    pair.run(scenario())


def test_many_at_once_each_get_their_own_answer(pair: Pair):
    async def scenario() -> None:
        prompts = [pair.new_prompt(20 + 7 * number) for number in range(12)]
        alone = [tokens_of(await pair.run_decode(prompt)) for prompt in prompts]

        async def through_both(prompt: list[int]) -> list[int]:
            finished = await pair.run_prefill(prompt)
            first = finished.delta.token_ids
            return first + tokens_of(await pair.run_decode(prompt + first, finished, max_tokens=7))

        assert await asyncio.gather(*map(through_both, prompts)) == alone
        await pair.all_free()

    pair.run(scenario())


def test_what_an_engine_tells_predicts_its_hits(pair: Pair):
    """Three prompts of 100, continued, cut at a block's end, and again: the index, fed with what the engine
    told so far, knows each hit before it happens."""

    async def scenario() -> None:
        assert pair.prefill_is.has_kv_events
        index = KvIndex(BLOCK, seed=1)
        feeds = KvFeeds(index)
        feeds.joined(0, "boot")
        starts = [pair.new_prompt(100) for _ in range(3)]
        prompts = [*starts, *(start + pair.new_prompt(60) for start in starts), starts[0][:96], *starts]
        hits = []
        for number, prompt in enumerate(prompts):
            await asyncio.sleep(0.1)  # events come by another way than outputs
            events, pair.prefill_heard.kv_events = pair.prefill_heard.kv_events, []
            feeds.received(0, "boot", number, events)
            predicted = BLOCK * index.match(index.prompt(pack_token_ids(prompt))).num_blocks
            finished = await pair.run_prefill(prompt, keep_kv=False)
            assert finished.delta.num_cached_tokens == predicted
            hits.append(predicted)
        # 3 full blocks of 100 tokens; of 96 tokens, which are 3 blocks, the last is always computed
        assert hits == [0, 0, 0, 96, 96, 96, 64, 96, 96, 96]

    pair.run(scenario())
