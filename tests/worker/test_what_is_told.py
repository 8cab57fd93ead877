"""What a worker tells of its cache and of the progress of its prompts."""

from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    AskKvReplay,
    BlocksRemoved,
    BlocksStored,
    Heartbeat,
    KvEvents,
    RegisterWorker,
    StepOutputs,
)
from baton.contract.tokens import pack_token_ids
from baton.ports import free_port


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
