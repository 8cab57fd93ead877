"""The coordinator's shell: whom it tells what, and in which order, when something fails meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.clock import ManualClock
from baton.contract import codec
from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    Message,
    RegisterAgain,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    WorkerLoad,
)
from baton.contract.sampling import StructuredOutput
from baton.contract.tokens import unpack_token_ids
from coordinator import app
from coordinator.app import Coordinator
from tests.coordinator.conftest import Bench

P, D = WorkerRole.PREFILL, WorkerRole.DECODE


class Wire:
    """Every peer is a worker's id; the dead ones cannot be sent to."""

    def __init__(self):
        self.sent: list[tuple[str, Message]] = []
        self.dead: set[str] = set()
        self.frames: list[bytes] = []

    def send(self, peer, frame):
        name = peer.decode()
        if name not in self.dead:
            self.frames.append(frame)
            self.sent.append((name, codec.coordinator_messages.decode(frame)))
        return name not in self.dead


@pytest.fixture
def shell():
    """1P1D that stream; with them what a bench has: `add`, `submit`, `finish_prefill`, `step`."""

    class Shell(Bench):
        def __init__(self):
            super().__init__()
            clock = ManualClock()
            self.app = Coordinator(
                self.core, clock, boot_id="b", heartbeat_interval_s=1.0, heartbeat_timeout_s=5.0
            )
            self.app._fleet_channel.close()
            self.wire = Wire()
            channel: Any = self.wire
            self.app._fleet_channel = channel

        def perform(self, actions):
            self.app._perform(actions)

        def say(self, worker_id, message):
            self.app._on_worker_frames(worker_id.encode(), [codec.encode(message)])

        def told(self, worker_id, *kinds):
            return [m for name, m in self.wire.sent if name == worker_id and isinstance(m, kinds)]

    shell = Shell()
    for name, role in (("p0", P), ("d0", D)):
        shell.add(name, role, stream_params={})
    return shell


def test_a_worker_that_is_found_dead_while_it_is_told_leaves_no_leg_behind(shell):
    """
    1. the prefill worker has just died, nobody knows yet; a request is planned with it
    2. telling it fails; the decode worker is told of the attempt, and that it is over, in this order
    """
    shell.wire.dead = {"p0"}
    shell.submit("r")
    started, ended = shell.told("d0", StartDecode), shell.told("d0", AbortLeg)
    told = [type(m).__name__ for m in shell.told("d0", StartDecode, AbortLeg)]
    assert told in ([], ["StartDecode", "AbortLeg"])
    assert [m.handoff_id for m in started] == [m.handoff_id for m in ended]


def decoding(shell, *request_ids):
    """Requests that have their first token: their hand-off ids, all on the same two workers."""
    ids = []
    for request_id in request_ids:
        shell.submit(request_id, max_tokens=9)
        ids.append(shell.told("p0", StartPrefill)[-1].handoff_id)
        shell.finish_prefill("p0", ids[-1])
        shell.step("d0", ids[-1], 100, text="x")
    return ids


def delta(handoff_id, *token_ids):
    return SequenceDelta(handoff_id, list(token_ids), "y" * len(token_ids))


def test_a_message_that_cannot_be_handled_costs_nobody_a_token(shell):
    """
    1. an engine says, in one step, a token of two requests; the first one's is no token id
    2. what follows in that message is not known to have been heard, so the worker is not trusted with these
       requests any more: it is told to begin anew, they go on from what their clients have
    """
    first, second = decoding(shell, "a", "b")
    shell.say("d0", StepOutputs(deltas=[delta(first, -1), delta(second, 7)], load=WorkerLoad()))
    shell.say("d0", StepOutputs(deltas=[delta(second, 8)], load=WorkerLoad()))
    assert shell.sinks["b"].token_ids in ([100], [100, 7, 8])  # whichever way: no gap
    assert shell.told("d0", RegisterAgain)
    shell.add("d0", D, stream_params={})
    resumed = shell.told("p0", StartPrefill)[-2:]
    assert [unpack_token_ids(m.prompt_token_ids)[20:] for m in resumed] == [[100], [100]]


def test_a_sink_that_breaks_costs_its_own_request_only(shell):
    """
    1. one step has a token of two requests; handing over the first one's fails, by a mistake of ours
    2. the second one's client has its token; the first one's request ends, with the name of the mistake
    """
    first, second = decoding(shell, "a", "b")
    broken = shell.sinks["a"]

    def break_down(*_):
        raise RuntimeError("a mistake")

    broken.on_delta = break_down
    shell.say("d0", StepOutputs(deltas=[delta(first, 7), delta(second, 7)], load=WorkerLoad()))
    assert shell.sinks["b"].token_ids == [100, 7]
    (report,) = broken.reports
    assert (report.outcome, report.error.code) == (Outcome.FAILED, "internal_error")
    assert [m.handoff_id for m in shell.told("d0", AbortLeg)] == [first]


def test_an_order_too_large_for_the_wire_ends_its_request_and_not_the_worker(shell):
    """A worker's socket would drop the connection over one such frame, and all that worker's legs with it."""
    decoding(shell, "a")
    schema = {"enum": [0.5] * 2_000_000}  # 8 MB as JSON, 18 MB in MessagePack
    sink = shell.submit("b", structured_output=StructuredOutput(json_schema=schema))
    (report,) = sink.reports
    assert (report.outcome, report.error.code) == (Outcome.FAILED, "invalid_request")
    assert max(map(len, shell.wire.frames)) <= codec.MAX_MESSAGE_BYTES
    assert shell.worker("p0") is not None and not shell.sinks["a"].reports


def test_time_goes_on_after_a_tick_that_failed(shell, monkeypatch):
    """Deadlines and dead workers are found by one task: it must outlive a mistake."""
    monkeypatch.setattr(app, "TICK_S", 0.001)
    ticks, enough = [], asyncio.Event()

    def tick(now_s):
        ticks.append(now_s)
        if len(ticks) == 3:
            enough.set()
        raise RuntimeError("a mistake")

    shell.core.tick = tick

    async def watch():
        task = asyncio.create_task(shell.app._tick_for_ever())
        async with asyncio.timeout(30.0):
            await asyncio.wait([task, asyncio.ensure_future(enough.wait())], return_when="FIRST_COMPLETED")
        task.cancel()

    asyncio.run(watch())
    assert len(ticks) >= 3
