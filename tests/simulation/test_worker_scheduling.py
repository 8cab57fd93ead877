"""Step policies and swapped KV in the simulated worker."""

from __future__ import annotations

from typing import Any

import pytest

from baton.scheduling.registry import by_name
from baton.simulation import SimulatedWorker, SimulatedWorkerSettings, StepResult
from baton.step_time import LinearStepTime

STEP_TIME = LinearStepTime(base_s=0.01, per_prefill_token_s=1e-4)


def worker(scheduler: str | None, **settings: Any) -> SimulatedWorker:
    defaults = {"num_blocks": 500, "block_size_tokens": 4, "max_batch_size": 4, "max_num_batched_tokens": 32}
    return SimulatedWorker(
        SimulatedWorkerSettings(**(defaults | settings)),
        STEP_TIME,
        None if scheduler is None else by_name(scheduler),
    )


def ends(w: SimulatedWorker, *, fetch: bool = True) -> list[str]:
    """Leg ids in the order they finish; what is to be fetched arrives at once."""
    found: list[str] = []
    now_s = 0.0
    while True:
        plan = w.begin_step(now_s, 1000)
        for fetched in w.places.take_fetches():
            assert fetch
            w.places.kv_arrived(fetched.leg_id)
        if plan is None:
            if not w.num_legs:
                return found
            if w.begin_step(now_s) is None:
                return found
        assert w.plan is not None
        now_s = w.plan.end_s
        result: StepResult = w.end_step()
        found += [leg.leg_id for leg in (*result.finished_prefills, *result.finished)]


def add(w: SimulatedWorker, leg_id: str, num_prompt: int, num_output: int) -> None:
    w.add_decode(leg_id, num_prompt, num_output, [], 0.0, is_kv_on_its_way=False)


def test_the_shortest_goes_first_when_there_is_one_place():
    orders = {}
    for name in (None, "srpt"):
        w = worker(name, max_batch_size=1)
        add(w, "long", 8, 50)
        add(w, "short", 8, 3)
        add(w, "middle", 8, 20)
        orders[name] = ends(w)
    assert orders == {None: ["long", "short", "middle"], "srpt": ["short", "middle", "long"]}


def test_a_short_prompt_overtakes_a_long_one_that_has_begun():
    for name, order in ((None, ["long", "short"]), ("shortest-prefill", ["short", "long"])):
        w = worker(name)
        w.add_prefill("long", 300, [], 0.0, keep_kv=False)
        w.begin_step(0.0)
        w.end_step()
        w.add_prefill("short", 20, [], 0.1, keep_kv=False)
        assert ends(w) == order


@pytest.mark.parametrize("scheduler", ["srpt", "skip-join-mlfq", "las", "fcfs"])
@pytest.mark.parametrize("can_swap", [False, True])
def test_all_end_and_all_blocks_return_when_memory_is_short(scheduler: str, can_swap: bool):
    w = worker(scheduler, num_blocks=40, can_swap=can_swap)
    for n in range(12):
        add(w, f"r{n}", 10 + n, 30 + 7 * (n % 4))
    assert sorted(ends(w)) == sorted(f"r{n}" for n in range(12))
    assert w.cache.num_free_blocks == 40
    assert w.places.num_preemptions > 0


def test_swapped_kv_is_fetched_and_not_computed_again():
    computed = {}
    for can_swap in (False, True):
        w = worker(None, num_blocks=20, can_swap=can_swap)
        for n in range(4):
            add(w, f"r{n}", 16, 40)
        ends(w)
        assert w.places.num_preemptions > 0
        computed[can_swap] = w.num_prefill_tokens_done
    assert computed[True] == 4 * 16 < computed[False]
