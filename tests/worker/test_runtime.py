"""The runtime between a hand-made coordinator (real ZeroMQ on loopback) and an engine."""

import asyncio
import pickle
import random

import msgspec
import pytest

from baton.contract import codec
from baton.contract.errors import EngineFailed, ProtocolMismatch, RegistrationRefused, WorkerIdTaken
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    AbortLeg,
    AskKvReplay,
    BlocksRemoved,
    BlocksStored,
    DrainWorker,
    Heartbeat,
    JoinTestPassed,
    KvEvents,
    KvSource,
    LegFailed,
    NoMoreLegs,
    PrefillFinished,
    RegisterWorker,
    SequenceDelta,
    StepOutputs,
    WorkerLeaving,
    WorkerRefused,
)
from baton.contract.tokens import pack_token_ids
from baton.engine.base import FinishedPrefill
from baton.engine.simulated.engine import SimulatedEngine
from baton.engine.simulated.settings import SimulatedEngineSettings
from baton.ports import free_port
from baton.worker.runtime import EndOfServing, with_lease_left


def finished_prefill(handoff_id="h1", lease_s=30.0):
    source = KvSource(lease_s=lease_s, num_tokens=3, num_bytes=1, transfer_params={"hold": 1})
    return FinishedPrefill(
        delta=SequenceDelta(handoff_id, [7], "a"), kv_source=source, prompt_logprobs=None,
        queue_s=0.0, prefill_s=0.0,
    )  # fmt: skip


# ── registration ─────────────────────────────────────────────────────────────────────────────────


async def test_registers_and_reports_its_load(make_coordinator, make_engine, run_runtime):
    coordinator = make_coordinator()
    async with run_runtime(make_engine(), coordinator.address, WorkerRole.PREFILL):
        registration = await coordinator.expect(RegisterWorker)
        assert registration.protocol_version == codec.PROTOCOL_VERSION
        assert (registration.worker_id, registration.boot_id) == ("w1", "boot-w1")
        assert registration.role is WorkerRole.PREFILL
        assert registration.capacity.num_blocks == 64
        heartbeat = await coordinator.expect(Heartbeat, 3)
        assert heartbeat.load.num_free_blocks == 64
        assert heartbeat.num_legs == 0
    assert len(coordinator.of(RegisterWorker)) == 1


async def test_waits_for_a_coordinator_that_comes_later(make_coordinator, make_engine, run_runtime):
    port = free_port()
    async with run_runtime(make_engine(), f"tcp://127.0.0.1:{port}"):
        coordinator = make_coordinator(port=port)
        await coordinator.expect(Heartbeat)


async def test_a_refusal_ends_serving_with_its_sentence(make_coordinator, make_engine, run_runtime):
    coordinator = make_coordinator()
    coordinator.is_accepting = False
    async with run_runtime(make_engine(), coordinator.address) as runtime:
        await coordinator.expect(RegisterWorker)
        coordinator.send(WorkerRefused(error=ProtocolMismatch("dtype is 'float16'").report()))
        await runtime.end_requested()
        assert runtime.end is EndOfServing.REFUSED
        assert runtime.end_reason == "dtype is 'float16'"


async def test_a_worker_that_fails_the_test_of_joining_ends_and_says_good_bye(
    make_coordinator, make_engine, run_runtime
):
    """It had been accepted, so the coordinator has it in its fleet."""
    coordinator = make_coordinator()
    async with run_runtime(make_engine(), coordinator.address) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.send(WorkerRefused(error=RegistrationRefused("token 0 is 5 instead of 7").report()))
        await runtime.end_requested()
        assert runtime.end is EndOfServing.REFUSED
        assert runtime.end_reason == "token 0 is 5 instead of 7"
    await coordinator.expect(WorkerLeaving, 2)


async def test_a_taken_worker_id_is_tried_again(make_coordinator, make_engine, run_runtime):
    """The predecessor crashed; the coordinator needs some seconds to notice."""
    coordinator = make_coordinator()
    coordinator.is_accepting = False
    async with run_runtime(make_engine(), coordinator.address) as runtime:
        await coordinator.expect(RegisterWorker)
        coordinator.send(WorkerRefused(error=WorkerIdTaken("w1 is in use").report()))
        coordinator.is_accepting = True
        await coordinator.expect(Heartbeat)
        assert runtime.end is None
    assert len(coordinator.of(RegisterWorker)) == 2


async def test_a_restarted_coordinator_meets_a_worker_without_legs(
    make_coordinator, make_engine, run_runtime, start_decode
):
    """
    1. a leg runs; the coordinator says it does not know this worker (it restarted)
    2. the leg is aborted, the worker registers by itself with the same boot id
    3. what the engine still says about the old leg reaches nobody; a new leg works
    """
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address):
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        await engine.expect(1)
        coordinator.forget()
        again = await coordinator.expect(RegisterWorker, 2)
        assert again.boot_id == "boot-w1"
        assert (await engine.expect(2))[1] == ("abort", "h1")
        engine.finish("h1")
        engine.confirm_abort("h1")
        await coordinator.expect_heartbeat_now()
        assert coordinator.of(Heartbeat)[-1].num_legs == 0
        coordinator.send(start_decode("h2"))
        await engine.expect(3)
        engine.finish("h2")
        outputs = await coordinator.expect(StepOutputs)
        assert [delta.handoff_id for delta in outputs.deltas] == ["h2"]
    assert coordinator.of(LegFailed) == []


async def test_a_coordinator_that_is_gone_ends_its_legs_at_once_successor_or_not(
    make_coordinator, make_engine, run_runtime, start_decode
):
    """
    1. a leg runs; the coordinator's process ends and nobody takes its place: the leg is aborted, since
       whoever wanted it was connected there
    2. a new one comes up on the same port: the worker registers, says what it has passed, and serves
    """
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address):
        await coordinator.expect(Heartbeat)
        coordinator.send(JoinTestPassed())
        coordinator.send(start_decode("h1"))
        await engine.expect(1)
        coordinator.close()
        assert (await engine.expect(2))[1] == ("abort", "h1")
        successor = make_coordinator(port=coordinator.port, boot_id="c2")
        await successor.expect(Heartbeat)
        told = [c.of(RegisterWorker)[-1].has_passed_join_test for c in (coordinator, successor)]
        assert told == [False, True]
        successor.send(start_decode("h2"))
        assert (await engine.expect(3))[2].handoff_id == "h2"
        engine.finish("h2")
        await successor.expect(StepOutputs)


async def test_a_burst_of_register_again_is_one_registration(make_coordinator, make_engine, run_runtime):
    coordinator = make_coordinator()
    async with run_runtime(make_engine(), coordinator.address):
        await coordinator.expect(Heartbeat)
        for _ in range(20):
            coordinator.forget()
        await coordinator.expect(RegisterWorker, 2)
        await coordinator.expect_heartbeat_now()
    assert len(coordinator.of(RegisterWorker)) == 2


async def test_a_queue_that_is_full_means_the_coordinator_is_lost(
    make_coordinator, make_engine, run_runtime, start_decode, monkeypatch
):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        await engine.expect(1)
        monkeypatch.setattr(runtime._channel, "send", lambda frame: False)
        engine.listener.on_step([SequenceDelta("h1", [7], "a")])
        assert (await engine.expect(2))[1] == ("abort", "h1")
        await coordinator.expect(RegisterWorker, 2)


# ── legs ─────────────────────────────────────────────────────────────────────────────────────────


async def test_prefill_answers_with_the_token_and_the_lease(
    make_coordinator, make_engine, run_runtime, start_prefill
):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address, WorkerRole.PREFILL):
        await coordinator.expect(Heartbeat)
        message = start_prefill("h1")
        coordinator.send(message)
        assert await engine.expect(1) == [message]
        engine.listener.on_prefill_finished(finished_prefill("h1"))
        answer = await coordinator.expect(PrefillFinished)
        assert answer.delta.token_ids == [7]
        assert answer.kv_source == finished_prefill().kv_source


async def test_all_tokens_of_a_step_are_one_message(make_coordinator, make_engine, run_runtime, start_decode):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address):
        await coordinator.expect(Heartbeat)
        for name in ("h1", "h2", "h3"):
            coordinator.send(start_decode(name))
        await engine.expect(3)
        deltas = [SequenceDelta(name, [7], "a") for name in ("h1", "h2", "h3")]
        engine.listener.on_step(deltas)
        assert (await coordinator.expect(StepOutputs)).deltas == deltas
        for name in ("h1", "h2", "h3"):
            engine.finish(name)
        await coordinator.expect(StepOutputs, 4)  # 1 + 3


async def test_duplicate_and_late_starts_do_not_reach_the_engine(
    make_coordinator, make_engine, run_runtime, start_decode
):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address):
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        coordinator.send(start_decode("h1"))
        await engine.expect(1)
        engine.finish("h1")
        await coordinator.expect(StepOutputs)
        coordinator.send(start_decode("h1"))
        coordinator.send(start_decode("h2"))
        commands = await engine.expect(2)
        assert [command.handoff_id for command in commands] == ["h1", "h2"]
        engine.finish("h2")


async def test_a_bad_leg_fails_without_the_engine(make_coordinator, make_engine, run_runtime, start_decode):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address):
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1", prompt=[1] * 256))
        failed = await coordinator.expect(LegFailed)
        assert failed.error.code == "context_length_exceeded"
        assert failed.error.message == "prompt has 256 tokens, this worker accepts 255 and one of output"
        assert engine.commands == []


async def test_abort_reaches_the_engine_and_its_answer_the_coordinator(
    make_coordinator, make_engine, run_runtime, start_decode
):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address):
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        coordinator.send(AbortLeg(handoff_id="h1"))
        assert (await engine.expect(2))[1] == ("abort", "h1")
        engine.confirm_abort("h1")
        failed = await coordinator.expect(LegFailed)
        assert (failed.handoff_id, failed.error.code) == ("h1", "aborted")


async def test_an_abort_for_a_finished_prefill_reaches_the_engine_too(
    make_coordinator, make_engine, run_runtime, start_prefill
):
    """Its KV is still held, and nobody will fetch it."""
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address, WorkerRole.PREFILL, drain_timeout_s=0.0):
        await coordinator.expect(Heartbeat)
        coordinator.send(start_prefill("h1"))
        await engine.expect(1)
        engine.listener.on_prefill_finished(finished_prefill("h1"))
        coordinator.send(AbortLeg(handoff_id="h1"))
        assert (await engine.expect(2))[1] == ("abort", "h1")
        await coordinator.expect_heartbeat_now()
    assert coordinator.of(LegFailed) == []


async def test_frames_that_are_not_messages_are_dropped(
    make_coordinator, make_engine, run_runtime, start_decode
):
    coordinator, engine = make_coordinator(), make_engine()
    dice = random.Random(7)
    good = codec.encode(start_decode("h0"))
    async with run_runtime(engine, coordinator.address) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.send_raw(b"")
        coordinator.send_raw(pickle.dumps({"type": "StartDecode"}))
        coordinator.send_raw(codec.encode(WorkerLeaving(reason="not for workers")))
        for _ in range(2_000):
            frame = bytearray(good)
            for _ in range(dice.randint(1, 4)):
                frame[dice.randrange(len(frame))] = dice.randrange(256)
            num_kept = dice.choice([len(frame), dice.randint(0, len(frame))])
            coordinator.send_raw(bytes(frame[:num_kept]))
        coordinator.send(start_decode("last"))
        while not any(getattr(command, "handoff_id", None) == "last" for command in engine.commands):
            await engine.expect(len(engine.commands) + 1)
        assert runtime.end is None


async def test_an_answer_too_large_for_the_wire_fails_its_leg_only(
    make_coordinator, make_engine, run_runtime, start_decode, monkeypatch
):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address):
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        await engine.expect(1)
        monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 4_096)
        engine.listener.on_step([SequenceDelta("h1", [7], "a" * 5_000)])
        failed = await coordinator.expect(LegFailed)
        assert failed.handoff_id == "h1"
        assert "the limit is 4096" in failed.error.message
        assert engine.commands[1] == ("abort", "h1")


# ── leaving ──────────────────────────────────────────────────────────────────────────────────────


async def test_drain_finishes_legs_and_those_promised_and_says_so_twice(
    make_coordinator, make_engine, run_runtime, start_decode
):
    """
    1. a leg runs, the coordinator asks for a drain: the worker says it is leaving
    2. another prompt was planned with it and has just been computed elsewhere: that leg is served, too
    3. both are over and the worker stays, until it hears that nothing was planned any more
    4. the engine stops, the worker says it is gone
    """
    coordinator, engine = make_coordinator(), make_engine()
    coordinator.is_dismissing = False
    async with run_runtime(engine, coordinator.address) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        await engine.expect(1)
        coordinator.send(DrainWorker())
        await runtime.end_requested()
        draining = asyncio.create_task(runtime.drain())
        await coordinator.expect(WorkerLeaving)
        coordinator.send(start_decode("h2"))
        await engine.expect(2)
        engine.finish("h1")
        engine.finish("h2")
        await coordinator.expect_heartbeat_now()
        assert not draining.done()
        assert not engine.is_stopped
        coordinator.send(NoMoreLegs())
        await draining
        await coordinator.expect(WorkerLeaving, 2)
        assert coordinator.of(StepOutputs)[-1].deltas[0].finish_reason == "stop"
        assert engine.is_stopped


async def test_a_worker_nobody_knows_waits_for_nobody(make_coordinator, make_engine, run_runtime):
    """Its coordinator is gone and will not tell it that it may go."""
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address, drain_timeout_s=1_000.0) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.is_dismissing = False
        runtime.request_drain("test")
        draining = asyncio.create_task(runtime.drain())
        await coordinator.expect(WorkerLeaving)
        coordinator.close()
        await draining


async def test_drain_waits_until_held_kv_was_read(make_coordinator, make_engine, run_runtime, start_prefill):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address, WorkerRole.PREFILL) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.send(start_prefill("h1"))
        await engine.expect(1)
        engine.num_free_blocks = 63
        engine.listener.on_prefill_finished(finished_prefill("h1", lease_s=1_000.0))
        runtime.request_drain("test")
        draining = asyncio.create_task(runtime.drain())
        await coordinator.expect(WorkerLeaving)
        await coordinator.expect_heartbeat_now()
        assert not draining.done()
        engine.num_free_blocks = 64  # read
        await draining


async def test_drain_does_not_wait_longer_than_the_lease(
    make_coordinator, make_engine, run_runtime, start_prefill
):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(
        engine, coordinator.address, WorkerRole.PREFILL, drain_timeout_s=1_000.0
    ) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.send(start_prefill("h1"))
        await engine.expect(1)
        engine.num_free_blocks = 63
        engine.listener.on_prefill_finished(finished_prefill("h1", lease_s=0.3))
        runtime.request_drain("test")
        await runtime.drain()


async def test_drain_is_bounded(make_coordinator, make_engine, run_runtime, start_decode):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address, drain_timeout_s=0.1) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        await engine.expect(1)
        runtime.request_drain("test")
        await runtime.drain()
        assert engine.is_stopped


async def test_a_dead_engine_ends_serving_and_the_coordinator_hears_it(
    make_coordinator, make_engine, run_runtime, start_decode
):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address) as runtime:
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        await engine.expect(1)
        engine.fail("h1", EngineFailed("the engine died").report())
        engine.listener.on_engine_dead("core process ended")
        await runtime.end_requested()
        assert runtime.end is EndOfServing.ENGINE_DEAD
    await coordinator.expect(WorkerLeaving, 2)
    assert coordinator.of(LegFailed)[0].error.code == "engine_failed"


# ── with the simulated engine ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_requests", [1, 50])
async def test_prefill_and_decode_workers_serve_a_request_together(
    make_coordinator, run_runtime, start_prefill, start_decode, num_requests
):
    """KV goes from one worker to the other; the tokens are those of one worker alone."""
    coordinators = make_coordinator(), make_coordinator()
    engines = SimulatedEngine(SimulatedEngineSettings()), SimulatedEngine(SimulatedEngineSettings())
    (to_prefill, to_decode), (prefill_engine, decode_engine) = coordinators, engines
    async with (
        run_runtime(prefill_engine, to_prefill.address, WorkerRole.PREFILL),
        run_runtime(decode_engine, to_decode.address, WorkerRole.DECODE),
    ):
        await to_prefill.expect(Heartbeat)
        await to_decode.expect(Heartbeat)
        for number in range(num_requests):
            prompt = [number + 1] * 100
            to_prefill.send(start_prefill(f"h{number}", prompt))
            to_decode.send(start_decode(f"alone{number}", prompt))
        for number in range(num_requests):
            finished = await to_prefill.expect(PrefillFinished, number + 1)
            number_of = int(finished.delta.handoff_id[1:])
            prompt = [number_of + 1] * 100 + finished.delta.token_ids
            to_decode.send(start_decode(f"h{number_of}", prompt, finished.kv_source, max_tokens=7))
        tokens = {f.delta.handoff_id: list(f.delta.token_ids) for f in to_prefill.of(PrefillFinished)}
        num_finished, num_seen = 0, 0
        while num_finished < 2 * num_requests:
            outputs = await to_decode.expect(StepOutputs, num_seen + 1)
            num_seen += 1
            for delta in outputs.deltas:
                tokens.setdefault(delta.handoff_id, []).extend(delta.token_ids)
                num_finished += delta.finish_reason is not None
        for number in range(num_requests):
            assert tokens[f"h{number}"] == tokens[f"alone{number}"]
            assert len(tokens[f"h{number}"]) == 8
        assert decode_engine.load().num_kv_transfers == num_requests
        assert prefill_engine.load().num_free_blocks == prefill_engine.settings.num_blocks


@pytest.mark.parametrize(
    ("sent_s", "left_s"),
    [
        pytest.param(None, 30.0, id="a coordinator that does not know our clock"),
        pytest.param(100.0, 30.0, id="sent this moment"),
        pytest.param(88.0, 18.0, id="12 s in queues"),
        pytest.param(60.0, 0.0, id="longer than the lease"),
        pytest.param(101.0, 30.0, id="from the future"),
    ],
)
def test_a_lease_is_shorter_by_the_time_its_message_lay_in_queues(start_decode, sent_s, left_s):
    source = KvSource(lease_s=30.0, num_tokens=3, num_bytes=8, transfer_params={})
    message = msgspec.structs.replace(start_decode(kv_source=source), sent_s=sent_s)
    left = with_lease_left(message, now_s=100.0).kv_source
    assert left is not None and left.lease_s == left_s


def test_a_leg_without_a_source_has_no_lease(start_decode):
    message = msgspec.structs.replace(start_decode(), sent_s=5.0)
    assert with_lease_left(message, now_s=100.0) is message


# ── prefix cache ─────────────────────────────────────────────────────────────────────────────────


def stored(name):
    return BlocksStored(block_hashes=[name], parent_hash=None, token_ids=pack_token_ids([name] * 16))


async def test_kv_events_are_numbered_and_sent_again(make_coordinator, make_engine, run_runtime):
    """
    1. two steps change the cache: batches 0 and 1, the engine's load with them
    2. asked for batch 1: the same again
    """
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address):
        assert (await coordinator.expect(RegisterWorker)).has_kv_events
        await coordinator.expect(Heartbeat)
        engine.num_free_blocks = 63
        engine.listener.on_kv_events([stored(1)])
        engine.listener.on_kv_events([stored(2), BlocksRemoved(block_hashes=[1])])
        second = await coordinator.expect(KvEvents, 2)
        assert (second.sequence, second.is_fresh_start, second.load.num_free_blocks) == (1, False, 63)
        assert second.events == [stored(2), BlocksRemoved(block_hashes=[1])]
        coordinator.send(AskKvReplay(first=1, last=1))
        assert await coordinator.expect(KvEvents, 3) == second


async def test_a_coordinator_that_comes_later_hears_what_the_cache_holds(
    make_coordinator, make_engine, run_runtime
):
    """
    1. the engine fills and drops blocks while nobody listens: four batches
    2. a coordinator accepts the worker: one fresh start, numbered after them, with what is left
    3. it restarts: the same once more, and nothing that was before it
    """
    port = free_port()
    engine = make_engine()
    async with run_runtime(engine, f"tcp://127.0.0.1:{port}"):
        for events in ([stored(1)], [stored(2)], [BlocksRemoved(block_hashes=[1])], [stored(3)]):
            engine.listener.on_kv_events(events)
        coordinator = make_coordinator(port=port)
        start = await coordinator.expect(KvEvents)
        assert (start.sequence, start.is_fresh_start) == (4, True)
        assert sorted(event.block_hashes[0] for event in start.events) == [2, 3]
        coordinator.forget()
        again = await coordinator.expect(KvEvents, 2)
        assert (again.sequence, again.is_fresh_start, again.events) == (5, True, start.events)


async def test_progress_of_prompts_is_told_without_tokens_and_once(
    make_coordinator, make_engine, run_runtime
):
    coordinator, engine = make_coordinator(), make_engine()
    async with run_runtime(engine, coordinator.address, WorkerRole.PREFILL):
        await coordinator.expect(Heartbeat)
        engine.num_prefill_tokens_done = 512
        engine.listener.on_step([])
        engine.listener.on_step([])
        engine.num_prefill_tokens_done = 700
        engine.listener.on_kv_events([stored(1)])
        engine.listener.on_step([])
        await coordinator.expect_heartbeat_now()
        (progress,) = coordinator.of(StepOutputs)
        assert (progress.deltas, progress.load.num_prefill_tokens_done) == ([], 512)
        assert coordinator.of(KvEvents)[0].load.num_prefill_tokens_done == 700
