"""The runtime between a hand-made coordinator (real ZeroMQ on loopback) and an engine: legs."""

import pickle
import random

import msgspec
import pytest

from baton.contract import codec
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    AbortLeg,
    Heartbeat,
    KvSource,
    LegFailed,
    PrefillFinished,
    SequenceDelta,
    StepOutputs,
    WorkerLeaving,
)
from baton.engine.simulated.engine import SimulatedEngine
from baton.engine.simulated.settings import SimulatedEngineSettings
from baton.worker.runtime import with_lease_left

# ── legs ─────────────────────────────────────────────────────────────────────────────────────────


async def test_prefill_answers_with_the_token_and_the_lease(
    make_coordinator, make_engine, run_runtime, start_prefill, finished_prefill
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


async def test_a_leg_that_the_engine_breaks_on_fails_at_once(
    make_coordinator, make_engine, run_runtime, start_decode
):
    """Otherwise its request would wait for as long as a phase may take, once for each attempt."""
    coordinator, engine = make_coordinator(), make_engine()

    def break_down(message):
        raise KeyError("a mistake")

    engine.start_decode = break_down
    async with run_runtime(engine, coordinator.address):
        await coordinator.expect(Heartbeat)
        coordinator.send(start_decode("h1"))
        failed = await coordinator.expect(LegFailed)
        assert (failed.handoff_id, failed.error.code) == ("h1", "engine_failed")
        assert await engine.expect(1) == [("abort", "h1")]


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
    make_coordinator, make_engine, run_runtime, start_prefill, finished_prefill
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
