"""A worker joins its coordinator, is refused, loses it, and joins the next one."""

from baton.contract import codec
from baton.contract.errors import ProtocolMismatch, RegistrationRefused, WorkerIdTaken
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    Heartbeat,
    JoinTestPassed,
    LegFailed,
    RegisterWorker,
    SequenceDelta,
    StepOutputs,
    WorkerLeaving,
    WorkerRefused,
)
from baton.ports import free_port
from baton.worker.runtime import EndOfServing


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
