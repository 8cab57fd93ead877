"""One leg fails, the other ends (users.md pains 3 and 4), in all its cases, a hundred times each.

A prefill or a decode worker refuses a leg, fails it, loses it after it has given something, or stalls; KV
is pulled or streamed. Whatever it is: the request ends once, with an error that names the phase and the
worker, both legs are over within a second (of the deadline, where nothing is said), and no block is kept.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from baton.contract.lifecycle import Outcome, WorkerRole
from baton.step_time import LinearStepTime
from tests.engine.simulated import generated
from tests.system.in_process import InProcessFleet, in_process_fleet

NUM_REQUESTS = 100
AT_ONCE = 25
PHASE_S = 1.0
"""The deadline of the phase that does not end; found by the coordinator's tick, up to 0.25 s later."""
LONG_S = 30.0
PROMISE_S = 1.0
CHUNK = 32

CASES = {
    ("prefill", "refuses"): "accept:error:code=draining",
    ("prefill", "fails"): "prefill:error",
    ("prefill", "breaks off"): "prefill:error:after=32",
    ("prefill", "stalls"): "prefill:stall:after=32",
    ("prefill", "is deaf"): "accept:ignore",
    ("decode", "refuses"): "accept:error:code=draining",
    ("decode", "fails"): "first:error",
    ("decode", "breaks off"): "token:error:after=3",
    ("decode", "stalls"): "token:stall:after=3",
    ("decode", "stalls before its first token"): "first:stall",
    ("decode", "is deaf"): "accept:ignore",
}


def in_fleet(
    scenario: Callable[[InProcessFleet], Awaitable[None]],
    *,
    max_attempts: int,
    prefill_s: float = LONG_S,
    decode_s: float = LONG_S,
) -> None:
    async def with_deadline() -> None:
        async with (
            asyncio.timeout(60),
            in_process_fleet(
                max_attempts=max_attempts,
                prefill_timeout_s=prefill_s,
                handoff_timeout_s=decode_s,
                decode_stall_timeout_s=decode_s,
            ) as fleet,
        ):
            await scenario(fleet)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(with_deadline())


def prompts(number: int, seed: object) -> list[list[int]]:
    """Of three chunks and a bit."""
    dice = random.Random(str(seed))
    return [[dice.randrange(1_000) for _ in range(100)] for _ in range(number)]


def worker(transfer: str) -> dict[str, Any]:
    return {
        "is_streaming": transfer == "stream",
        "max_num_batched_tokens": CHUNK,
        "step_time": LinearStepTime(base_s=0.001),
        "num_blocks": 1024,
    }


async def all_right(fleet: InProcessFleet, asked: list[list[int]], *, max_tokens: int) -> None:
    answers = [fleet.ask(prompt, max_tokens=max_tokens) for prompt in asked]
    for prompt, answer in zip(asked, answers, strict=True):
        await answer.done.wait()
        assert answer.report is not None
        assert answer.report.outcome is Outcome.COMPLETED, answer.report.error
        assert answer.token_ids == generated(prompt, max_tokens=max_tokens)[0]


@pytest.mark.parametrize("transfer", ["pull", "stream"])
@pytest.mark.parametrize(("side", "what"), CASES)
def test_one_legs_failure_ends_the_other(side: str, what: str, transfer: str) -> None:
    fault = CASES[side, what]
    is_silent = "error" not in fault
    limit_s = PROMISE_S + (PHASE_S if is_silent else 0.0)
    faulty = side[0]
    deaf = faulty if what == "is deaf" else None

    async def scenario(fleet: InProcessFleet) -> None:
        for role, name in ((WorkerRole.PREFILL, "p"), (WorkerRole.DECODE, "d")):
            await fleet.add(role, name, *([fault] if name == faulty else []), **worker(transfer))
        # Deadlines take their time: all of them at once.
        at_once = NUM_REQUESTS if is_silent else AT_ONCE
        for start in range(0, NUM_REQUESTS, at_once):
            answers = [fleet.ask(prompt, max_tokens=20) for prompt in prompts(at_once, (fault, start))]
            for answer in answers:
                await answer.done.wait()
                report = answer.report
                assert report is not None and report.error is not None
                assert report.outcome is (Outcome.EXPIRED if is_silent else Outcome.FAILED)
                assert report.error.worker_id == faulty, report.error
                assert report.error.phase, report.error
            await fleet.idle(PROMISE_S, but=deaf)
        legs = {name: member.runtime.legs for name, member in fleet.members.items()}
        assert len(legs[faulty]) == NUM_REQUESTS
        for handoff_id, leg in legs[faulty].items():
            assert leg.struck_s is not None
            both = [leg] if deaf is None else []
            both += [
                other[handoff_id] for name, other in legs.items() if name != faulty and handoff_id in other
            ]
            for each in both:
                assert each.ended_s is not None and each.ended_s - leg.struck_s < limit_s
        assert sum(member.engine.num_stray_writes for member in fleet.members.values()) == 0

    in_fleet(scenario, max_attempts=1, **{f"{side}_s": PHASE_S})


@pytest.mark.parametrize("transfer", ["pull", "stream"])
def test_with_somebody_else_there_nobody_hears_of_it(transfer: str) -> None:
    """All these failures at once on one of two workers of each side: every answer is whole and right."""
    faults = {
        "p1": ["accept:error:every=5,code=draining", "accept:ignore:nth=11", "prefill:error:every=4,after=32",
               "prefill:stall:nth=7,after=32", "transfer:fail:every=6"],
        "d1": ["accept:error:every=7,code=draining", "accept:ignore:nth=13", "transfer:fail:every=5",
               "transfer:reset:every=9", "first:error:every=6", "token:error:every=4,after=3",
               "token:stall:nth=9,after=5"],
    }  # fmt: skip

    async def scenario(fleet: InProcessFleet) -> None:
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
            for number in (1, 2):
                name = f"{role.value[0]}{number}"
                await fleet.add(role, name, *faults.get(name, []), **worker(transfer))
        for start in range(0, 2 * AT_ONCE, AT_ONCE):
            await all_right(fleet, prompts(AT_ONCE, (transfer, start)), max_tokens=40)
        struck = [fleet.members[name].engine.faults.num_struck for name in ("p1", "d1")]
        assert min(struck) > 3
        for member in fleet.members.values():
            assert member.engine.num_stray_writes == 0

    in_fleet(scenario, max_attempts=6, prefill_s=2.0, decode_s=2.0)


@pytest.mark.parametrize("transfer", ["pull", "stream"])
@pytest.mark.parametrize(
    ("name", "fault"),
    [("p1", "prefill:kill:nth=3,after=32"), ("d1", "token:kill:nth=3,after=3"), ("d1", "first:kill:nth=3")],
    ids=["prefill worker", "decode worker", "decode worker before its first token"],
)
def test_a_process_dies_ten_times_and_is_back(name: str, fault: str, transfer: str) -> None:
    """In the middle of a leg, under load: every answer is whole and right, and the survivors keep nothing."""

    async def scenario(fleet: InProcessFleet) -> None:
        role = WorkerRole.PREFILL if name == "p1" else WorkerRole.DECODE
        for each in ("p1", "p2", "d1", "d2"):
            if each != name:
                other = WorkerRole.PREFILL if each[0] == "p" else WorkerRole.DECODE
                await fleet.add(other, each, **worker(transfer))
        for number in range(10):
            await fleet.add(role, name, fault, **worker(transfer))
            await all_right(fleet, prompts(12, (name, number)), max_tokens=20)
            assert name not in fleet.members
        await fleet.idle(PROMISE_S)

    in_fleet(scenario, max_attempts=6, prefill_s=2.0, decode_s=2.0)
