"""A worker's counterparts: a coordinator made by hand on real ZeroMQ, an engine that does as told.

`async def` tests in this folder run on an event loop of their own, with a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from baton.clock import SystemClock
from baton.contract import codec
from baton.contract.errors import Aborted, ErrorReport
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    Heartbeat,
    KvLayout,
    KvSource,
    NoMoreLegs,
    RegisterAgain,
    RegisterWorker,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    WorkerAccepted,
    WorkerCapacity,
    WorkerLeaving,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.base import EngineDescription, FinishedPrefill
from baton.wire.channels import RouterChannel
from baton.worker.runtime import WorkerIdentity, WorkerRuntime

DEADLINE_S = 20.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None

    async def with_deadline():
        names = pyfuncitem._fixtureinfo.argnames
        arguments = {name: pyfuncitem.funcargs[name] for name in names}
        try:
            async with asyncio.timeout(DEADLINE_S):
                await pyfuncitem.obj(**arguments)
        finally:
            for coordinator in getattr(arguments.get("make_coordinator"), "made", ()):
                coordinator.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(with_deadline())
    return True


class FakeCoordinator:
    """Records what workers send; answers registrations when told to."""

    def __init__(self, port: int = 0, boot_id: str = "c1", heartbeat_interval_s: float = 0.05) -> None:
        self.boot_id = boot_id
        self.heartbeat_interval_s = heartbeat_interval_s
        self.is_accepting = True
        self.is_dismissing = True
        """A worker that leaves is told at once that nothing was planned with it."""
        self.received: list[tuple[bytes, object]] = []
        self._news = asyncio.Event()
        self._channel = RouterChannel(self._on_frames)
        self.address = self._channel.bind(f"tcp://127.0.0.1:{port}")
        self._channel.start()
        self.peer = b""
        """The connection that registered last."""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def _on_frames(self, peer, frames):
        message = codec.worker_messages.decode(frames[0])
        self.received.append((peer, message))
        if isinstance(message, RegisterWorker):
            self.peer = peer
            if self.is_accepting:
                self.accept()
        if isinstance(message, WorkerLeaving) and self.is_dismissing:
            self._channel.send(peer, codec.encode(NoMoreLegs()))
        self._news.set()

    def accept(self):
        self.send(
            WorkerAccepted(
                protocol_version=codec.PROTOCOL_VERSION,
                coordinator_boot_id=self.boot_id,
                heartbeat_interval_s=self.heartbeat_interval_s,
            )
        )

    def send(self, message):
        assert self._channel.send(self.peer, codec.encode(message))

    def send_raw(self, frame):
        assert self._channel.send(self.peer, frame)

    def forget(self):
        """As after a restart: every word of the worker is answered by RegisterAgain."""
        self.send(RegisterAgain())

    def of(self, kind):
        return [message for _, message in self.received if isinstance(message, kind)]

    async def expect(self, kind, number=1):
        """The `number`-th message of a kind, now or when it comes."""
        while len(found := self.of(kind)) < number:
            self._news.clear()
            await self._news.wait()
        return found[number - 1]

    async def expect_heartbeat_now(self):
        """A heartbeat sent after this call: whatever the worker was told before has been seen."""
        return await self.expect(Heartbeat, len(self.of(Heartbeat)) + 2)

    def close(self):
        self._channel.close()


class ScriptedEngine:
    """Records commands; the test plays the engine's part through `listener`."""

    def __init__(self) -> None:
        self.commands: list[object] = []
        self.num_free_blocks = 64
        self.num_prefill_tokens_done = 0
        self.is_stopped = False
        self._news = asyncio.Event()

    async def start(self, listener):
        self.listener = listener
        return EngineDescription(
            layout=KvLayout(
                model="m", engine="scripted 1", transfer="none", dtype="float32",
                num_layers=1, num_kv_heads=1, head_dim=1, block_size_tokens=16,
            ),
            capacity=WorkerCapacity(num_blocks=64, max_batch_size=4, max_model_len=256, kv_bytes_per_block=1),
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            transfer_endpoint="127.0.0.1:1",
            has_kv_events=True,
        )  # fmt: skip

    def _record(self, command):
        self.commands.append(command)
        self._news.set()

    def start_prefill(self, message):
        self._record(message)

    def start_decode(self, message):
        self._record(message)

    def abort(self, handoff_id):
        self._record(("abort", handoff_id))

    def load(self):
        return WorkerLoad(
            num_free_blocks=self.num_free_blocks, num_prefill_tokens_done=self.num_prefill_tokens_done
        )

    async def stop(self):
        self.is_stopped = True

    async def expect(self, number):
        """The first `number` commands."""
        while len(self.commands) < number:
            self._news.clear()
            await self._news.wait()
        return self.commands[:number]

    def finish(self, handoff_id, text="x"):
        self.listener.on_step([SequenceDelta(handoff_id, [120], text, "stop")])

    def confirm_abort(self, handoff_id):
        self.listener.on_leg_failed(handoff_id, Aborted("stopped").report())

    def fail(self, handoff_id, error: ErrorReport):
        self.listener.on_leg_failed(handoff_id, error)


@contextlib.asynccontextmanager
async def running_worker(
    engine, coordinator_address, role=WorkerRole.DECODE, *, drain_timeout_s=5.0, worker_id="w1"
) -> AsyncIterator[WorkerRuntime]:
    identity = WorkerIdentity(
        worker_id=worker_id, boot_id=f"boot-{worker_id}", role=role, host="127.0.0.1", pid=1
    )
    runtime = WorkerRuntime(
        engine, identity, coordinator_address, SystemClock(), drain_timeout_s=drain_timeout_s
    )
    await runtime.start()
    serving = asyncio.create_task(runtime.serve())
    try:
        yield runtime
        if not serving.done():
            runtime.request_drain("the test is over")
        await serving
    finally:
        serving.cancel()
        await runtime.stop()


class CoordinatorMaker:
    def __init__(self) -> None:
        self.made: list[FakeCoordinator] = []

    def __call__(self, **arguments):
        self.made.append(FakeCoordinator(**arguments))
        return self.made[-1]


@pytest.fixture
def make_coordinator():
    """Call inside the test's event loop, which closes what was made."""
    return CoordinatorMaker()


@pytest.fixture
def run_runtime() -> Callable[..., contextlib.AbstractAsyncContextManager[WorkerRuntime]]:
    return running_worker


@pytest.fixture
def make_engine():
    return ScriptedEngine


def _start_prefill(handoff_id="h1", prompt=(1, 2, 3), **sampling):
    return StartPrefill(
        handoff_id=handoff_id,
        request_id=f"r-{handoff_id}",
        prompt_token_ids=pack_token_ids(prompt),
        sampling=SamplingSpec(**{"max_tokens": 8, "temperature": 0.0} | sampling),
        keep_kv=True,
    )


def _start_decode(handoff_id="h1", prompt=(1, 2, 3), kv_source=None, **sampling):
    return StartDecode(
        handoff_id=handoff_id,
        request_id=f"r-{handoff_id}",
        prompt_token_ids=pack_token_ids(prompt),
        sampling=SamplingSpec(**{"max_tokens": 8, "temperature": 0.0} | sampling),
        kv_source=kv_source,
    )


def _finished_prefill(handoff_id="h1", lease_s=30.0):
    source = KvSource(lease_s=lease_s, num_tokens=3, num_bytes=1, transfer_params={"hold": 1})
    return FinishedPrefill(
        delta=SequenceDelta(handoff_id, [7], "a"), kv_source=source, prompt_logprobs=None,
        queue_s=0.0, prefill_s=0.0,
    )  # fmt: skip


@pytest.fixture
def start_prefill():
    return _start_prefill


@pytest.fixture
def start_decode():
    return _start_decode


@pytest.fixture
def finished_prefill():
    return _finished_prefill
