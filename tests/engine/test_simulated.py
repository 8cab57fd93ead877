"""What the simulated engine adds to the contract: honest scarcity, leases, and its model."""

from __future__ import annotations

import asyncio
import contextlib
import random

import msgspec
import pytest

from baton.clock import ManualClock
from baton.contract.messages import KvSource
from baton.contract.sampling import StructuredOutput
from baton.contract.tokens import pack_token_ids
from baton.engine.simulated.model import EOS_TOKEN_ID, kv_of
from baton.policy.kv_feed import KvFeeds
from baton.policy.kv_index import KvIndex
from baton.step_time import LinearStepTime
from tests.engine.simulated import all_free, decode, generated, in_loop, prefill, running

# ── the model ────────────────────────────────────────────────────────────────────────────────────


def test_any_changed_block_changes_the_output():
    prompt = list(range(100, 180))
    outputs = set()
    for changed in [None, 0, 16, 32, 48, 64, 79]:
        variant = [token + (index == changed) for index, token in enumerate(prompt)]
        outputs.add(generated(variant, max_tokens=16)[1])
    assert len(outputs) == 7


def test_output_continues_from_prompt_and_first_token():
    prompt = [5, 6, 7]
    tokens, _, _ = generated(prompt, max_tokens=10)
    assert generated(prompt + tokens[:1], max_tokens=9)[0] == tokens[1:]


def test_kv_can_be_continued_from_any_prefix():
    packed = pack_token_ids([5, 6, 7, 8])
    assert kv_of(packed[8:], kv_of(packed[:8])) == kv_of(packed)


def test_a_seed_changes_sampled_output_only():
    greedy = generated([1], max_tokens=16)[0]
    assert generated([1], max_tokens=16, seed=3)[0] == greedy
    sampled = generated([1], max_tokens=16, seed=3, temperature=1.0)[0]
    assert sampled != greedy
    assert generated([1], max_tokens=16, seed=3, temperature=1.0)[0] == sampled
    assert generated([1], max_tokens=16, seed=4, temperature=1.0)[0] != sampled


@pytest.mark.parametrize("start", range(0, 30, 3))
@pytest.mark.parametrize("num_characters", [1, 2, 5])
@pytest.mark.parametrize("is_included", [False, True], ids=["cut", "included"])
def test_a_stop_string_is_cut_wherever_tokens_end(start, num_characters, is_included):
    text = generated([9, 9], max_tokens=40)[1]
    stop = text[start : start + num_characters]
    wanted = text[: text.index(stop) + (len(stop) if is_included else 0)]
    _, given, last = generated(
        [9, 9], max_tokens=40, stop=[stop, "0"], include_stop_str_in_output=is_included
    )
    assert given == wanted
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)


def test_held_back_text_is_given_when_the_sequence_ends():
    tokens, text, last = generated([9, 9], max_tokens=12, stop=["0123456789"])
    assert len(text) == len(tokens) == 12
    assert last.finish_reason == "length"


def test_min_tokens_postpones_every_stop():
    tokens, text, _ = generated([4], max_tokens=30)
    later = generated([4], max_tokens=30, stop=[text[0]], min_tokens=10)[0]
    assert len(later) >= 10
    assert len(generated([4], max_tokens=30, stop_token_ids=[tokens[0]], min_tokens=10)[0]) > 10
    assert len(generated([4], max_tokens=30, min_tokens=20, mean_output_tokens=1)[0]) == 21


def test_ends_by_itself_unless_told_to_ignore_it():
    tokens, text, last = generated([3], max_tokens=400, mean_output_tokens=5)
    assert tokens[-1] == EOS_TOKEN_ID
    assert len(text) == len(tokens) - 1  # the end token has no text
    assert (last.finish_reason, last.stop_reason) == ("stop", None)
    assert len(generated([3], max_tokens=400, mean_output_tokens=5, ignore_eos=True)[0]) == 400


# ── scarcity ─────────────────────────────────────────────────────────────────────────────────────


@in_loop
async def test_no_more_legs_run_than_the_batch_holds():
    async with running(max_batch_size=2) as (engine, heard):
        for number in range(5):
            engine.start_decode(decode(f"h{number}", [number], max_tokens=4))
        await heard.until(lambda: heard.tokens)
        assert (engine.load().num_running, engine.load().num_waiting) == (2, 3)
        await heard.ended(*(f"h{number}" for number in range(5)))
        assert heard.order == [f"h{number}" for number in range(5)]


@in_loop
async def test_a_full_cache_makes_legs_wait():
    async with running(num_blocks=4) as (engine, heard):
        engine.start_prefill(prefill("h1", [1] * 64))  # all 4 blocks, then held
        engine.start_prefill(prefill("h2", [2] * 16))
        await heard.ended("h1")
        assert engine.load().num_free_blocks == 0
        assert engine.load().num_waiting == 1
        engine.abort("h1")  # gives the hold back
        await heard.ended("h2")
        assert heard.prefills["h2"].kv_source is not None


@in_loop
async def test_growth_over_a_full_cache_preempts_the_youngest_and_changes_no_answer():
    """Two legs of 16 + 40 tokens need 4 blocks each at their end; there are 5."""
    async with running(num_blocks=5) as (engine, heard):
        engine.start_decode(decode("old", [1] * 16, max_tokens=40))
        engine.start_decode(decode("young", [2] * 16, max_tokens=40))
        await heard.ended("old", "young")
        assert heard.order == ["old", "young"]
        assert engine.load().num_preemptions >= 1
        assert engine.load().num_free_blocks == 5
        assert heard.tokens["old"] == generated([1] * 16, max_tokens=40)[0]
        assert heard.tokens["young"] == generated([2] * 16, max_tokens=40)[0]


@in_loop
async def test_what_can_never_fit_is_refused():
    async with running(num_blocks=4) as (engine, heard):
        engine.start_decode(decode("h1", [1] * 60, max_tokens=20))  # 80 tokens, 5 blocks
        await heard.ended("h1")
        assert heard.failures["h1"].message == "prompt and output need 5 blocks, this engine has 4"


@in_loop
async def test_a_long_prompt_is_computed_in_chunks_beside_decoding():
    async with running(max_num_batched_tokens=32) as (engine, heard):
        engine.start_decode(decode("d", [1], max_tokens=200))
        await heard.until(lambda: heard.tokens)
        engine.start_prefill(prefill("p", [2] * 320))
        num_before = len(heard.tokens["d"])
        await heard.ended("p")
        num_steps = len(heard.tokens["d"]) - num_before
        assert num_steps in (10, 11, 12)  # 320 / 31 a step, and the step it came in


@in_loop
async def test_what_the_model_cannot_do_is_refused():
    async with running() as (engine, heard):
        engine.start_decode(decode("h1", [1], structured_output=StructuredOutput(json_object=True)))
        await heard.ended("h1")
        assert heard.failures["h1"].code == "unsupported_feature"
        assert heard.failures["h1"].param == "structured_output"


# ── prefix cache ─────────────────────────────────────────────────────────────────────────────────


@in_loop
async def test_the_known_beginning_of_a_prompt_is_not_computed_again():
    async with running() as (engine, heard):
        for name, prompt in (("h1", [7] * 64), ("h2", [7] * 64), ("h3", [7] * 40 + [8] * 24)):
            engine.start_prefill(prefill(name, prompt))
            await heard.ended(name)
            engine.abort(name)
        cached = [heard.prefills[name].delta.num_cached_tokens for name in ("h1", "h2", "h3")]
        assert cached == [0, 48, 32]  # the last token is always computed; full blocks of 16 only
        assert engine.load().num_prefill_tokens_done == 64 + 16 + 32


@in_loop
async def test_kv_that_came_from_elsewhere_is_a_hit_afterwards_and_is_not_fetched_twice():
    prompt = [5] * 64
    async with running() as (source_engine, source), running() as (engine, heard):
        for name in ("h1", "h2"):
            source_engine.start_prefill(prefill(name, prompt))
            await source.ended(name)
            engine.start_decode(decode(name, [*prompt, 9], source.prefills[name].kv_source))
            await heard.ended(name)
        load = engine.load()
        assert load.num_kv_transfers == 2
        assert load.num_kv_bytes_received == 4 * engine.settings.kv_bytes_per_block  # of the first alone


@in_loop
async def test_prompt_logprobs_need_every_position():
    async with running() as (engine, heard):
        for name in ("h1", "h2"):
            engine.start_prefill(prefill(name, [7] * 64, prompt_logprobs=1))
            await heard.ended(name)
        assert heard.prefills["h2"].delta.num_cached_tokens == 0


@pytest.mark.parametrize("seed", range(3))
@in_loop
async def test_kv_events_tell_every_hit_in_advance(seed):
    """Prompts from a small tree through a small cache, one at a time: an index that hears the events
    predicts exactly what the engine finds, also after blocks were evicted."""
    dice = random.Random(seed)
    feed = KvFeeds(index := KvIndex(16))
    feed.joined(0, "boot")
    num_hits = 0
    async with running(num_blocks=24) as (engine, heard):
        for number in range(200):
            prompt = [
                token
                for _ in range(dice.randint(1, 5))
                for token in [dice.randrange(2)] * dice.choice([16, 24])
            ]
            feed.received(0, "boot", number, heard.kv_events)
            heard.kv_events = []
            [predicted] = index.blocks_by_slot(index.match(index.prompt(pack_token_ids(prompt))), 1)
            engine.start_prefill(prefill(f"h{number}", prompt))
            await heard.ended(f"h{number}")
            engine.abort(f"h{number}")
            cached = heard.prefills[f"h{number}"].delta.num_cached_tokens
            assert cached == predicted * 16
            num_hits += cached > 0
    assert 50 < num_hits < 200


# ── pace ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("late_s", "expected_s"), [(0.0, 0.1), (0.09, 0.1), (5.0, 5.04)], ids=["on time", "late", "stood still"]
)
@in_loop
async def test_steps_follow_each_other_without_gaps_unless_the_machine_stood_still(late_s, expected_s):
    """Ten chunks of 0.01 s each. Late timers do not add up: the next step begins where the one before
    it was planned to end. After standing still it goes on from then, with the four steps that are left."""
    clock = ManualClock()
    async with running(
        clock, max_num_batched_tokens=16, step_time=LinearStepTime(base_s=0.01), num_blocks=10
    ) as (engine, heard):
        engine.start_prefill(prefill("h1", list(range(160))))
        while engine.load().num_prefill_tokens_done < 80:  # noqa: ASYNC110
            await asyncio.sleep(0)
        clock.advance(late_s)
        await heard.ended("h1")
        assert heard.prefills["h1"].prefill_s == pytest.approx(expected_s, abs=0.011)
        assert heard.prefills["h1"].queue_s == 0.0


# ── leases and transfers ─────────────────────────────────────────────────────────────────────────


@in_loop
async def test_an_unread_hold_ends_with_its_lease():
    clock = ManualClock()
    async with running(clock) as (engine, heard):
        engine.start_prefill(prefill("h1", [1] * 32))
        await heard.ended("h1")
        assert engine.load().num_free_blocks == 62  # 64 - 2 held
        clock.advance(30.0)
        assert engine.load().num_free_blocks == 64


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize(
    "trouble", ["lease over", "source dead", "already read", "slow transfer", "nonsense"]
)
@in_loop
async def test_kv_that_does_not_come_is_recomputed_or_an_error(trouble, policy):
    clock, prompt = ManualClock(), [1, 2, 3] * 10
    transfer_s = 0.8 if trouble == "slow transfer" else 0.0
    async with (
        running(clock, transfer_s=transfer_s) as (source_engine, source_heard),
        running(kv_load_failure_policy=policy) as (engine, heard),
    ):
        source_engine.start_prefill(prefill("h1", prompt))
        await source_heard.ended("h1")
        source = source_heard.prefills["h1"].kv_source
        if trouble == "lease over":
            clock.advance(31.0)  # the source let go; this reader does not know
        elif trouble == "source dead":
            await source_engine.stop()
        elif trouble == "already read":
            engine.start_decode(decode("thief", prompt, source))
            await heard.ended("thief")
        elif trouble == "slow transfer":
            source = msgspec.structs.replace(source, lease_s=0.05)
        elif trouble == "nonsense":
            source = msgspec.structs.replace(source, transfer_params={"endpoint": "no:where", "boot_id": "x"})
        engine.start_decode(decode("h1", prompt, source))
        await heard.ended("h1")
        assert engine.load().num_kv_transfer_failures == 1
        if trouble == "slow transfer":
            assert engine.load().num_free_blocks == 62  # the late write may still land in two of them
        await all_free(engine)
        if policy == "fail":
            assert (heard.failures["h1"].code, heard.failures["h1"].phase) == (
                "kv_transfer_failed",
                "handing_off",
            )
        else:
            assert heard.tokens["h1"] == generated(prompt)[0]


@in_loop
async def test_the_wrong_kv_gives_the_wrong_answer():
    """So that a mixed-up hand-off cannot pass for a right one in any test that uses this engine."""
    async with running() as (engine, heard):
        engine.start_prefill(prefill("h1", [1] * 30))
        await heard.ended("h1")
        stolen: KvSource = heard.prefills["h1"].kv_source
        engine.start_decode(decode("h2", [2] * 30, stolen))
        await heard.ended("h2")
        assert heard.tokens["h2"] == generated([1] * 30)[0] != generated([2] * 30)[0]


@in_loop
async def test_the_kv_server_hangs_up_on_strangers():
    async with running() as (engine, heard):
        engine.start_prefill(prefill("h1", [1] * 30))
        await heard.ended("h1")
        endpoint = heard.prefills["h1"].kv_source.transfer_params["endpoint"]
        host, _, port = endpoint.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x80\x04\x95" * 1_000)
        with contextlib.suppress(ConnectionResetError):
            while await reader.read(1_000):
                pass
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()
        engine.start_decode(decode("h1", [1] * 30, heard.prefills["h1"].kv_source))
        await heard.until(lambda: "h1" in heard.last)


@pytest.mark.parametrize("seed", range(5))
@in_loop
async def test_random_work_and_aborts_leave_nothing_behind(seed):
    """300 hand-offs through small caches, a third of them aborted at a random moment on both sides:
    every leg ends once, answers are right, and both engines have all their blocks again."""
    dice = random.Random(seed)
    small = {"num_blocks": 24, "max_batch_size": 6, "max_num_batched_tokens": 48}
    async with running(**small) as (source_engine, source), running(**small) as (engine, heard):

        async def hand_off(name):
            prompt = [dice.randrange(1_000) for _ in range(dice.randint(1, 100))]
            num_tokens = dice.randint(2, 40)
            source_engine.start_prefill(prefill(name, prompt, max_tokens=num_tokens))
            if is_aborted := dice.random() < 0.33:
                for _ in range(dice.randrange(12)):
                    await asyncio.sleep(0)
                source_engine.abort(name)
            await source.ended(name)
            if name in source.failures:
                return
            first = source.prefills[name].delta.token_ids
            kv_source = source.prefills[name].kv_source
            engine.start_decode(decode(name, prompt + first, kv_source, max_tokens=num_tokens - 1))
            if is_aborted:
                for _ in range(dice.randrange(40)):
                    await asyncio.sleep(0)
                engine.abort(name)
                source_engine.abort(name)
            await heard.ended(name)
            if name in heard.last:
                assert first + heard.tokens[name] == generated(prompt, max_tokens=num_tokens)[0]

        names = [f"h{number}" for number in range(300)]
        await asyncio.gather(*map(hand_off, names))
        for name in names:
            source_engine.abort(name)  # what nobody came to fetch
        assert len(source.order) == len(set(source.order)) == 300
        assert len(heard.order) == len(set(heard.order))
        assert 0 < len(heard.last) < 300
        for each in (source_engine, engine):
            load = each.load()
            assert (load.num_running, load.num_waiting, load.num_free_blocks) == (0, 0, 24)


@in_loop
async def test_stop_fails_what_runs_and_may_be_repeated():
    async with running(step_time=LinearStepTime(base_s=3_600.0)) as (engine, heard):
        engine.start_decode(decode("h1", [1]))
        await engine.stop()
        await engine.stop()
        assert heard.failures["h1"].code == "aborted"
        assert engine.load().num_free_blocks == 64
