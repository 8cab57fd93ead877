"""Both halves on a network that loses, repeats and reorders, with workers that die.

What the world checks at every landing: the bytes are those that were meant, and the blocks still
belong to that hand-off. What is checked here: in the end nobody holds anything and everybody was told.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.handoff.world import World

ADVERSARY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUM_FAIR_ROUNDS = 400


def adverse_steps(world: World, data: st.DataObject, num_steps: int, *, may_die: bool) -> None:
    jobs = list(world.jobs.values())
    kinds = ["prefill", "prefill", "decode", "deliver", "deliver", "land", "repeat", "lose", "time"]
    kinds += ["abort_prefill", "abort_decode", "preempt"] + (
        ["kill_source", "kill_destination"] if may_die else []
    )
    for _ in range(num_steps):
        kind = data.draw(st.sampled_from(kinds))
        job = data.draw(st.sampled_from(jobs))
        if kind == "prefill":
            world.step_prefill(job)
        elif kind == "decode":
            world.step_decode(job)
        elif kind == "land" and world.in_flight:
            world.land(data.draw(st.integers(0, len(world.in_flight) - 1)))
        elif kind in ("deliver", "repeat", "lose") and world.messages:
            index = data.draw(st.integers(0, len(world.messages) - 1))
            if kind == "lose":
                world.lose(index)
            else:
                world.deliver(index, is_repeated=kind == "repeat")
        elif kind == "abort_prefill":
            world.end_prefill(job, None)
        elif kind == "abort_decode":
            world.abort_decode(job)
        elif kind == "preempt":
            world.preempt(job)
        elif kind == "time":
            world.pass_time(data.draw(st.sampled_from([0.1, 1.5, 12.0, 40.0])))
        elif kind == "kill_source":
            world.kill_source()
        elif kind == "kill_destination":
            world.kill_destination()


def fair_end(world: World) -> None:
    """Nothing is lost any more, everybody works on; clients of given-up requests go away."""
    for _ in range(NUM_FAIR_ROUNDS):
        is_queue_stuck = False  # as in vLLM, the first that waits is not overtaken
        for job in world.jobs.values():
            if job.source_blocks or not is_queue_stuck:
                world.step_prefill(job)
            is_queue_stuck |= not job.is_prefill_over and not job.source_blocks
        for job in world.jobs.values():
            if job.was_given_up or (job.is_prefill_over and job.num_computed < job.num_blocks):
                world.abort_decode(job)
            else:
                world.step_decode(job)
        while world.in_flight or world.messages:
            while world.in_flight:
                world.land(0)
            if world.messages:
                world.deliver(0)
        world.pass_time(1.0)


def assert_nothing_is_held(world: World, *, source_pool: int, destination_pool: int) -> None:
    if world.is_source_alive:
        assert len(world.source_free) == source_pool
        assert world.source.is_idle
    if world.is_destination_alive:
        assert len(world.destination_free) == destination_pool
        assert world.destination.is_idle
        assert world.credits.num_reserved_blocks == 0
        assert world.writable == {}


@ADVERSARY
@given(st.data())
def test_whatever_happens_nothing_lands_wrong_and_nothing_is_held_for_ever(data: st.DataObject):
    world = World(source_pool=12, destination_pool=12)
    for number in range(data.draw(st.integers(1, 5))):
        first_token = data.draw(st.sampled_from([None, 70 + number]))
        world.add(f"h{number}", data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2)), first_token)
    adverse_steps(world, data, data.draw(st.integers(0, 80)), may_die=True)
    fair_end(world)
    assert_nothing_is_held(world, source_pool=12, destination_pool=12)


@ADVERSARY
@given(st.data())
def test_a_tiny_decode_pool_never_deadlocks(data: st.DataObject):
    """Both pools fit one prompt. Both workers take prompts up in one order, as the coordinator sends
    them; then every hand-off of a healthy pair succeeds, wherever each side stands."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))
    world = World(source_pool=4, destination_pool=4)
    for number, size in enumerate(sizes):
        world.add(f"h{number}", size, first_token=data.draw(st.sampled_from([None, 70 + number])))
    jobs = list(world.jobs.values())
    for _ in range(data.draw(st.integers(0, 40))):
        # Prompts are taken up in one order on both workers; how far each has come is arbitrary.
        side = data.draw(st.sampled_from(["prefill", "decode", "land", "deliver"]))
        if side == "prefill":
            for job in jobs:
                if not job.is_prefill_over:
                    world.step_prefill(job)
                    break
        elif side == "decode":
            for job in jobs:
                if not job.destination_blocks:
                    world.step_decode(job)
                    break
        elif side == "land" and world.in_flight:
            world.land(data.draw(st.integers(0, len(world.in_flight) - 1)))
        elif side == "deliver" and world.messages:
            world.deliver(data.draw(st.integers(0, len(world.messages) - 1)))
    fair_end(world)
    assert world.num_activated == len(sizes)
    assert_nothing_is_held(world, source_pool=4, destination_pool=4)


def test_the_world_itself_finds_a_free_on_a_timeout():
    """The check bites: freeing at the silence deadline instead of quarantining is caught."""
    world = World(source_pool=8, destination_pool=4)
    job = world.add("h0", 4)
    world.step_decode(job)
    world.deliver(0)
    world.step_prefill(job)
    assert world.in_flight
    world._free(job)  # what a decode side with a bare timeout would do
    other = world.add("h1", 4)
    world.step_decode(other)
    with pytest.raises(AssertionError, match=r"landed in blocks of \('h1', 1\)"):
        world.land(0)
