"""Simulated engines stream KV by the machines of `baton.handoff`, as real ones do."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from baton.clock import ManualClock
from baton.engine.simulated.faults import Faults
from baton.engine.simulated.link import Greeting, LinkServer
from baton.handoff.timing import SILENCE_S
from baton.step_time import LinearStepTime
from tests.engine.simulated import (
    all_free,
    decode,
    generated,
    in_loop,
    prefill,
    running,
    stream_from,
)

CHUNK = 32
CHUNK_S = 0.02
PACED = {
    "is_streaming": True,
    "max_num_batched_tokens": CHUNK,
    "step_time": LinearStepTime(base_s=0.0, per_prefill_token_s=CHUNK_S / CHUNK),
}
STREAMING = {"is_streaming": True, "max_num_batched_tokens": CHUNK}
BLOCK = 16


def prompt_of(num_tokens, seed=0):
    dice = random.Random(f"{num_tokens}/{seed}")
    return [dice.randrange(1_000) for _ in range(num_tokens)]


def start_both(source_engine, source, engine, name, prompt, **sampling):
    source_engine.start_prefill(prefill(name, prompt, **sampling))
    engine.start_decode(decode(name, prompt, stream_from(source, len(prompt)), **sampling))


@pytest.mark.parametrize("num_tokens", [1, BLOCK, BLOCK + 1, 5 * CHUNK, 5 * CHUNK + 3])
@pytest.mark.parametrize("order", ["prefill first", "decode first", "decode after the prefill"])
@pytest.mark.parametrize("has_first_token", [False, True], ids=["samples all", "goes on from the first"])
@in_loop
async def test_streamed_answers_are_those_of_one_engine_alone(num_tokens, order, has_first_token):
    """Whoever comes first, and also when the prefill is over: late binding is the same path."""
    prompt = prompt_of(num_tokens)
    async with running(**STREAMING) as (source_engine, source), running(**STREAMING) as (engine, heard):
        steps = [
            lambda: source_engine.start_prefill(prefill("h1", prompt)),
            lambda: engine.start_decode(
                decode("h1", prompt, stream_from(source, num_tokens, has_first_token=has_first_token))
            ),
        ]
        for step in reversed(steps) if order == "decode first" else steps:
            step()
            if order == "decode after the prefill":
                await source.until(lambda: "h1" in source.prefills)
        await heard.ended("h1")
        await source.ended("h1")
        assert heard.tokens["h1"] == generated(prompt)[0]
        assert engine.load().num_kv_transfers == 1
        assert source.prefills["h1"].delta.token_ids == heard.tokens["h1"][:1]
        # The last position is computed here, as a step that decodes, and by the first token it is not.
        assert engine.load().num_prefill_tokens_done == 0
        num_blocks = -(-num_tokens // BLOCK)
        assert engine.load().num_kv_bytes_received == num_blocks * engine.settings.kv_bytes_per_block
        await all_free(source_engine, engine)


@in_loop
async def test_what_either_side_has_already_is_not_computed_and_not_sent():
    """
    1. a hit on the prefill worker is sent all the same: the decode worker does not have it
    2. a hit on the decode worker is not sent
    3. but for the prompt's last block, which is always computed here or there
    """
    first, rest = prompt_of(64), prompt_of(40, 1)
    async with running(**STREAMING) as (source_engine, source), running(**STREAMING) as (engine, heard):
        source_engine.start_prefill(prefill("warm", first))
        await source.ended("warm")
        source_engine.abort("warm")
        received = [0]
        for name, prompt in (("h1", first), ("h2", first + rest), ("h3", first + rest)):
            start_both(source_engine, source, engine, name, prompt)
            await heard.ended(name)
            await source.ended(name)
            assert heard.tokens[name] == generated(prompt)[0]
            received.append(engine.load().num_kv_bytes_received // engine.settings.kv_bytes_per_block)
        assert source.prefills["h1"].delta.num_cached_tokens == 48
        # 4 blocks of 64 tokens; 40 more are 3 blocks, and of 104 the last full one ends at 96
        assert [after - before for before, after in itertools.pairwise(received)] == [4, 3, 1]
        await all_free(source_engine, engine)


@in_loop
async def test_only_the_last_chunk_is_exposed():
    """The link needs half of what computing needs: a pull waits for the whole transfer, a stream for the part
    of it that the last chunk makes up, whatever the prompt's length."""
    exposed_s = {}
    for num_chunks in (4, 12):
        prompt = prompt_of(num_chunks * CHUNK)
        transfer_s = num_chunks * CHUNK_S / 2
        for way in ("stream", "pull"):
            async with (
                running(**PACED, transfer_s=transfer_s) as (source_engine, source),
                running(**STREAMING) as (engine, heard),
            ):
                now = asyncio.get_running_loop().time
                source_engine.start_prefill(prefill("h1", prompt))
                if way == "stream":
                    engine.start_decode(decode("h1", prompt, stream_from(source, len(prompt))))
                await source.ended("h1")
                computed_s = now()
                if way == "pull":
                    engine.start_decode(decode("h1", prompt, source.prefills["h1"].kv_source))
                await heard.until(lambda: heard.tokens)
                exposed_s[way, num_chunks] = now() - computed_s
                assert engine.load().num_kv_transfers == 1
    for num_chunks in (4, 12):
        # Exactly: one chunk of the transfer, 0.01 s, against all of it. Timers are late on a busy machine.
        assert exposed_s["pull", num_chunks] >= num_chunks * CHUNK_S / 2
        assert exposed_s["stream", num_chunks] >= CHUNK_S / 2 * 0.5
    assert exposed_s["stream", 12] < exposed_s["pull", 12] * 0.6


@in_loop
async def test_a_tiny_decode_pool_serves_a_burst_in_turn():
    """32 prompts of 6 blocks and 2 more of output, 12 blocks here and 24 there: promises wait for credits,
    finished prompts for room, and nobody for ever."""
    small = {"num_blocks": 12, "max_batch_size": 32}
    async with (
        running(**STREAMING, num_blocks=24) as (source_engine, source),
        running(**STREAMING, **small) as (engine, heard),
    ):
        prompts = {f"h{number}": prompt_of(90, number) for number in range(32)}
        for name, prompt in prompts.items():
            start_both(source_engine, source, engine, name, prompt, max_tokens=20)
        await heard.ended(*prompts)
        assert not heard.failures
        for name, prompt in prompts.items():
            assert heard.tokens[name] == generated(prompt, max_tokens=20)[0]
        await all_free(source_engine, engine)


@pytest.mark.parametrize("seed", range(4))
@in_loop
async def test_random_streams_and_aborts_leave_nothing_behind(seed):
    """200 streams through small pools with a slow link, half of them aborted at random moments on one side or
    both: every leg ends once, answers are right, no write lands in blocks that are not promised to it, and
    both engines have all their blocks again."""
    dice = random.Random(seed)
    small = {"num_blocks": 40, "max_batch_size": 6, "is_streaming": True, "max_num_batched_tokens": CHUNK}
    async with (
        running(**small, transfer_s=0.01) as (source_engine, source),
        running(**small) as (engine, heard),
    ):

        async def hand_off(name):
            prompt = prompt_of(dice.randint(1, 150), name)
            start_both(source_engine, source, engine, name, prompt, max_tokens=dice.randint(2, 20))
            if dice.random() < 0.5:
                for victim in dice.sample([source_engine, engine], dice.choice([1, 2])):
                    await asyncio.sleep(dice.random() * 0.02)
                    victim.abort(name)
            await heard.ended(name)
            await source.ended(name)
            if name in heard.last:
                assert heard.tokens[name] == generated(prompt, max_tokens=len(heard.tokens[name]))[0]
            source_engine.abort(name)

        names = [f"h{number}" for number in range(200)]
        for start in range(0, len(names), 20):
            await asyncio.gather(*map(hand_off, names[start : start + 20]))
        await all_free(source_engine, engine)
        assert len(heard.order) == len(set(heard.order)) == 200
        assert len(heard.last) > 50
        assert engine.num_stray_writes == 0


# ── either side fails ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("trouble", ["aborted", "failed", "stopped", "a write fails"])
@in_loop
async def test_a_prefill_that_ends_early_ends_the_wait_for_it(trouble, policy):
    """In the middle of its prompt, with blocks written. The decode leg hears at once, not by a deadline."""
    prompt = prompt_of(8 * CHUNK)
    fault = {"failed": ["prefill:error:after=96"], "a write fails": ["transfer:fail"]}.get(trouble, [])
    async with (
        running(**PACED, faults=Faults(*fault)) as (source_engine, source),
        running(**STREAMING, kv_load_failure_policy=policy) as (engine, heard),
    ):
        start_both(source_engine, source, engine, "h1", prompt)
        while source_engine.load().num_prefill_tokens_done < 96:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        started_s = asyncio.get_running_loop().time()
        if trouble == "aborted":
            source_engine.abort("h1")
        elif trouble == "stopped":
            await source_engine.stop()
        await heard.ended("h1")
        assert asyncio.get_running_loop().time() - started_s < 1.0
        assert engine.load().num_kv_transfer_failures == 1
        if policy == "fail":
            assert heard.failures["h1"].code == "kv_transfer_failed"
        else:
            assert heard.tokens["h1"] == generated(prompt)[0]
        if trouble == "a write fails":
            await source.ended("h1")
            source_engine.abort("h1")
        await all_free(source_engine, engine)


@in_loop
async def test_blocks_that_a_hung_write_may_reach_are_used_again_only_when_the_source_agrees():
    """
    1. the link hangs in the middle of a write; the decode leg is aborted, and over at once
    2. its blocks stay until the source has heard the cancel and given the write up
    3. the prefill goes on; its own hold ends with its owner
    """
    prompt = prompt_of(4 * CHUNK)
    async with (
        running(**PACED, faults=Faults("transfer:stall:nth=1")) as (source_engine, source),
        running(**STREAMING) as (engine, heard),
    ):
        start_both(source_engine, source, engine, "h1", prompt)
        await source.ended("h1")
        assert "h1" not in heard.order
        source_engine.abort("h1")
        assert source_engine.load().num_free_blocks == 64 - 8  # a write is reading them
        engine.abort("h1")
        assert heard.failures["h1"].code == "aborted"
        assert engine.load().num_free_blocks == 64 - 8
        await all_free(engine, source_engine)
        start_both(source_engine, source, engine, "h2", prompt)
        await heard.ended("h2")
        assert heard.tokens["h2"] == generated(prompt)[0]


@in_loop
async def test_silence_quarantines_and_only_a_proof_of_death_frees():
    """
    1. a source greets and then says nothing: after the silence the leg computes its prompt in other blocks
    2. its first blocks stay, however long; the source may be alive, as far as anybody can know
    3. nobody listens on its port any more: they are free
    """
    clock, prompt = ManualClock(), prompt_of(64)
    mute = LinkServer(Greeting("mute", "boot-1"), lambda *_: None, lambda *_: None)
    port = await mute.start("127.0.0.1", 0)
    async with running(clock, **STREAMING) as (engine, heard), running(**STREAMING) as (_, other):
        source = stream_from(other, 64, lease_s=600.0)
        source.transfer_params.update(endpoint=f"127.0.0.1:{port}", boot_id="boot-1")
        engine.start_decode(decode("h1", prompt, source))
        await asyncio.sleep(0.05)
        assert engine.load().num_free_blocks == 64 - 4
        clock.advance(SILENCE_S)
        await heard.ended("h1")
        assert heard.tokens["h1"] == generated(prompt)[0]
        clock.advance(3_600.0)
        await asyncio.sleep(0.3)
        assert engine.load().num_free_blocks == 64 - 4
        await mute.stop()
        await all_free(engine)


@in_loop
async def test_a_source_that_restarted_on_its_port_is_another_source():
    """The old one's promise is void at once; the new one streams."""
    prompt = prompt_of(8 * CHUNK)
    async with running(**STREAMING) as (engine, heard):
        async with running(**PACED) as (source_engine, source):
            port = int(source.description.transfer_endpoint.rpartition(":")[2])
            start_both(source_engine, source, engine, "h1", prompt)
            while not source_engine.load().num_prefill_tokens_done:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        async with running(**PACED, transfer_port=port) as (source_engine, source):
            started_s = asyncio.get_running_loop().time()
            await heard.ended("h1")
            assert asyncio.get_running_loop().time() - started_s < 1.0
            assert heard.tokens["h1"] == generated(prompt)[0]
            start_both(source_engine, source, engine, "h2", prompt_of(70))
            await heard.ended("h2")
            assert engine.load().num_kv_transfers == 1
            await all_free(engine, source_engine)


@pytest.mark.parametrize("side", ["source", "destination"])
@in_loop
async def test_a_link_that_breaks_is_opened_again(side):
    """Whichever end broke it. What was being written is lost with it and its leg recomputes; other hand-offs
    of the pair go on, and nobody's blocks are kept."""
    fault = Faults("transfer:reset:nth=2")
    async with (
        running(**PACED, faults=fault if side == "source" else None) as (source_engine, source),
        running(**STREAMING, faults=fault if side == "destination" else None) as (engine, heard),
    ):
        started_s = asyncio.get_running_loop().time()
        prompts = {f"h{number}": prompt_of(3 * CHUNK, number) for number in range(4)}
        for name, prompt in prompts.items():
            start_both(source_engine, source, engine, name, prompt)
            await asyncio.sleep(0.01)
        await heard.ended(*prompts)
        await source.ended(*prompts)
        for name, prompt in prompts.items():
            assert heard.tokens[name] == generated(prompt)[0]
        assert fault.num_struck == 1
        assert engine.load().num_kv_transfers >= 2
        assert asyncio.get_running_loop().time() - started_s < SILENCE_S  # nobody had to wait for that
        for name in prompts:
            source_engine.abort(name)
        await all_free(source_engine, engine)
