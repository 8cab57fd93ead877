"""A fleet in one event loop: coordinator, worker runtimes and simulated engines, on real sockets. Imported,
not collected. It starts in milliseconds, so a case can be repeated a hundred times, and when each leg began
and ended in each engine is known."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from baton.clock import SystemClock
from baton.contract.errors import EngineFailed, ErrorReport
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import Placement, RequestReport, SequenceDelta, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.base import FinishedPrefill
from baton.engine.simulated.engine import SimulatedEngine
from baton.engine.simulated.faults import Fault, Faults
from baton.engine.simulated.settings import SimulatedEngineSettings
from baton.policy import registry
from baton.worker.runtime import WorkerIdentity, WorkerRuntime
from coordinator.app import Coordinator
from coordinator.core import Core, CoreSettings
from coordinator.intake import Submission

BLOCK = 16
TICK_S = 0.01
HEARTBEAT_S = 0.2


class FairClock:
    """Seconds in which this process got its turns: what it stood still for on a busy machine is not counted,
    so a promise of one second can be measured."""

    def __init__(self) -> None:
        self.now_s = 0.0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = loop.time()
            self.now_s += min(now_s - last_s, 2 * TICK_S)
            last_s = now_s


@dataclass
class Leg:
    """Times by the fair clock."""

    ended_s: float | None = None
    error: ErrorReport | None = None
    struck_s: float | None = None
    """By a fault."""


class WatchedRuntime(WorkerRuntime):
    """Remembers when each leg began and ended in its engine."""

    def __init__(self, *arguments: Any, fair_clock: FairClock, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.fair_clock = fair_clock
        self.legs: dict[str, Leg] = {}

    def _end(self, handoff_id: str, error: ErrorReport | None = None) -> None:
        leg = self.legs[handoff_id]
        leg.ended_s, leg.error = self.fair_clock.now_s, error

    def on_step(self, deltas: list[SequenceDelta]) -> None:
        for delta in deltas:
            if delta.finish_reason is not None:
                self._end(delta.handoff_id)
        super().on_step(deltas)

    def on_prefill_finished(self, finished: FinishedPrefill) -> None:
        self._end(finished.delta.handoff_id)
        super().on_prefill_finished(finished)

    def on_leg_failed(self, handoff_id: str, error: ErrorReport) -> None:
        self._end(handoff_id, error)
        super().on_leg_failed(handoff_id, error)


class WatchedEngine(SimulatedEngine):
    runtime: WatchedRuntime

    def _strike(self, handoff_id: str, fault: Fault) -> None:
        self.runtime.legs[handoff_id].struck_s = self.runtime.fair_clock.now_s
        super()._strike(handoff_id, fault)

    def start_prefill(self, message: StartPrefill) -> None:
        self.runtime.legs[message.handoff_id] = Leg()
        super().start_prefill(message)

    def start_decode(self, message: StartDecode) -> None:
        self.runtime.legs[message.handoff_id] = Leg()
        super().start_decode(message)


@dataclass
class Member:
    engine: WatchedEngine
    runtime: WatchedRuntime
    serving: asyncio.Task[Any]


@dataclass
class Answer:
    """A sink."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    report: RequestReport | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None:
        self.token_ids += delta.token_ids

    def on_finished(self, report: RequestReport) -> None:
        assert self.report is None, f"{self.request_id} ended twice"
        self.report = report
        self.done.set()


class InProcessFleet:
    def __init__(self, **core: Any) -> None:
        policies = (registry.by_name("lmetric"), registry.by_name("smallest-batch"))
        self.core = Core(CoreSettings(**core), *policies, "test")
        self.coordinator = Coordinator(
            self.core,
            SystemClock(),
            boot_id="test",
            heartbeat_interval_s=HEARTBEAT_S,
            heartbeat_timeout_s=60.0,
        )
        self.members: dict[str, Member] = {}
        self.address = self.coordinator.start("tcp://127.0.0.1:0")
        self.fair_clock = FairClock()
        self._ticking = asyncio.create_task(self.fair_clock.run(), name="fair clock")
        self._numbers = itertools.count(1)

    async def add(self, role: WorkerRole, name: str, *faults: str, **settings: Any) -> Member:
        """A worker that is killed by a fault is gone from `members`."""
        base: dict[str, Any] = {
            "name": name,
            "block_size_tokens": BLOCK,
            "num_blocks": 512,
            "max_model_len": 1024,
        }
        engine = WatchedEngine(SimulatedEngineSettings(**base | settings), faults=Faults(*faults))
        number = next(self._numbers)
        identity = WorkerIdentity(
            worker_id=name, boot_id=f"{name}-{number}", role=role, host="127.0.0.1", pid=number
        )
        engine.runtime = WatchedRuntime(
            engine, identity, self.address, SystemClock(), drain_timeout_s=1.0, fair_clock=self.fair_clock
        )
        await engine.runtime.start()
        serving = asyncio.create_task(engine.runtime.serve(), name=f"serve {name}")
        member = self.members[name] = Member(engine, engine.runtime, serving)
        engine.faults.kill = lambda: self._vanish(name)
        while not self._is_registered(identity):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return member

    def _is_registered(self, identity: WorkerIdentity) -> bool:
        worker = self.core.fleet.get(identity.worker_id)
        return worker is not None and worker.registration.boot_id == identity.boot_id

    def _vanish(self, name: str) -> None:
        """What others see of kill -9: all sockets are closed, and nothing is said."""
        member = self.members.pop(name)
        channel, member.runtime._channel = member.runtime._channel, None
        if channel is not None:
            channel.close()
        member.serving.cancel()
        member.engine._fail_all("killed", EngineFailed)

    def ask(self, prompt: list[int], **sampling: Any) -> Answer:
        answer = Answer(f"r{next(self._numbers)}")
        spec = SamplingSpec(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | sampling)
        self.coordinator.submit(
            Submission(request_id=answer.request_id, prompt_token_ids=pack_token_ids(prompt), sampling=spec),
            answer,
        )
        return answer

    def what_is_held(self, but: str | None = None) -> list[str]:
        """`but`: a worker that nothing is expected of any more."""
        held = [f"{account} is not zero" for account in self.core.check_idle()]
        if self.core.num_requests:
            held.append(f"{self.core.num_requests} requests")
        for name, member in self.members.items():
            if name == but:
                continue
            load, num_blocks = member.engine.load(), member.engine.settings.num_blocks
            if (load.num_running, load.num_waiting, load.num_free_blocks) != (0, 0, num_blocks):
                held.append(f"{name}: {load}")
        return held

    async def idle(self, within_s: float, *, but: str | None = None) -> None:
        deadline_s = self.fair_clock.now_s + within_s
        while held := self.what_is_held(but):
            assert self.fair_clock.now_s < deadline_s, f"after {within_s:g} s still held: {held}"
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        for member in self.members.values():
            member.serving.cancel()
            await member.runtime.stop()
        await self.coordinator.stop()
        self._ticking.cancel()


@contextlib.asynccontextmanager
async def in_process_fleet(**core: Any) -> AsyncIterator[InProcessFleet]:
    fleet = InProcessFleet(**core)
    try:
        yield fleet
    finally:
        await fleet.stop()
