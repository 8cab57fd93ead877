"""A worker leaves: legs and held KV first, and who hears of it."""

import asyncio

from baton.contract.errors import EngineFailed
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    DrainWorker,
    Heartbeat,
    LegFailed,
    NoMoreLegs,
    StepOutputs,
    WorkerLeaving,
)
from baton.worker.runtime import EndOfServing


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


async def test_drain_waits_until_held_kv_was_read(
    make_coordinator, make_engine, run_runtime, start_prefill, finished_prefill
):
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
    make_coordinator, make_engine, run_runtime, start_prefill, finished_prefill
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
