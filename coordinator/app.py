"""The coordinator's shell: sockets, timers, and carrying out what the core decides.

One event loop owns everything. A message comes in, the core answers with actions, the actions are
carried out before the next message is looked at: decisions are serialised, so two requests never
see the same idle worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict

import msgspec

from baton.clock import Clock
from baton.contract import codec
from baton.contract.errors import InvalidRequest, ProtocolMismatch, ServingError
from baton.contract.messages import (
    Heartbeat,
    KvEvents,
    LegFailed,
    Message,
    PrefillFinished,
    RegisterAgain,
    RegisterWorker,
    RequestReport,
    SchedulerCounters,
    StartDecode,
    StartPrefill,
    StepOutputs,
    StillThere,
    WorkerAccepted,
    WorkerLeaving,
    WorkerMessage,
    WorkerRefused,
)
from baton.wire.channels import RouterChannel
from coordinator.actions import Action, Deliver, Finish, Send
from coordinator.core import Core
from coordinator.decision_log import DecisionLog
from coordinator.fleet import Worker
from coordinator.intake import OUR_MISTAKE, FleetFacts, ResultSink, Submission

logger = logging.getLogger("baton.coordinator")
request_log = logging.getLogger("baton.requests")

TICK_S = 0.25


class Coordinator:
    """Implements `Intake` for the doors; speaks with the workers."""

    def __init__(
        self,
        core: Core,
        clock: Clock,
        *,
        boot_id: str,
        heartbeat_interval_s: float,
        heartbeat_timeout_s: float,
        decision_log: DecisionLog | None = None,
    ) -> None:
        """`decision_log`: for a core that keeps records."""
        self._core = core
        self._clock = clock
        self._boot_id = boot_id
        self._heartbeat_interval_s = heartbeat_interval_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._decision_log = decision_log
        self._fleet_channel = RouterChannel(self._on_worker_frames, on_disconnect=self._look_for_lost)
        self._ticker: asyncio.Task[None] | None = None
        self.on_finished: list[Callable[[RequestReport], None]] = []
        """Called for each request's end, before its client hears it."""
        self.on_worker_registered: list[Callable[[RegisterWorker], None]] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._undone: deque[Action] = deque()
        self._is_performing = False

    # ── start and stop ───────────────────────────────────────────────────────────────────────

    def start(self, fleet_address: str) -> str:
        """Returns the bound address. Raises OSError when it is taken."""
        bound = self._fleet_channel.bind(fleet_address)
        self._fleet_channel.start()
        self._ticker = asyncio.create_task(self._tick_for_ever(), name="coordinator-ticker")
        return bound

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let accepted ones finish, end the rest after `timeout_s`."""
        self._core.is_draining = True
        logger.info("drain started num_requests=%d", self._core.num_requests)
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self._perform(self._core.abort_all("the coordinator was shut down", self._clock.now_s()))

    async def stop(self) -> None:
        self._core.is_draining = True
        self._perform(self._core.abort_all("the coordinator was shut down", self._clock.now_s()))
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        self._fleet_channel.close(linger_ms=500)

    async def _tick_for_ever(self) -> None:
        last_s = self._clock.now_s()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock.now_s()
            stalled_s = now_s - last_s - TICK_S
            last_s = now_s
            if stalled_s > self._heartbeat_timeout_s / 2:
                # We ourselves stood still: what the workers sent meanwhile is still unread.
                logger.warning("event loop stalled stalled_s=%.1f", stalled_s)
                continue
            try:
                self._tick(now_s)
            except Exception:  # no deadline would ever end anything again
                logger.exception("tick failed")

    def _tick(self, now_s: float) -> None:
        for worker in list(self._core.fleet):
            silent_s = now_s - worker.last_heard_s
            if silent_s > self._heartbeat_timeout_s:
                self._lose(worker.worker_id, f"nothing heard for {silent_s:.1f} s")
            elif silent_s > 2 * self._heartbeat_interval_s:
                self._is_there(worker)
        self._perform(self._core.tick(now_s))

    # ── the doors' side: Intake ──────────────────────────────────────────────────────────────

    def submit(self, submission: Submission, sink: ResultSink) -> None:
        actions = self._core.submit(submission, sink, self._clock.now_s())
        self._idle.clear()
        self._perform(actions)

    def abort(self, request_id: str) -> None:
        self._perform(self._core.abort(request_id, self._clock.now_s()))

    def facts(self) -> FleetFacts:
        return self._core.facts()

    def snapshot(self) -> dict[str, object]:
        """The fleet as JSON-ready values: who is registered, how loaded, what is promised."""
        now_s = self._clock.now_s()
        return {
            "num_requests": self._core.num_requests,
            "num_queued": self._core.num_queued,
            "is_draining": self._core.is_draining,
            "bad_pairs": [asdict(pair) for pair in self._core.bad_pairs(now_s)],
            "workers": [_worker_snapshot(worker, now_s) for worker in self._core.fleet],
        }

    # ── the workers' side ────────────────────────────────────────────────────────────────────

    def _on_worker_frames(self, peer: bytes, frames: list[bytes]) -> None:
        worker = self._core.fleet.at(peer)
        try:
            if len(frames) != 1:
                raise ProtocolMismatch(f"a message is one frame, got {len(frames)}")
            message = codec.worker_messages.decode(frames[0])
        except ProtocolMismatch as error:
            logger.warning(
                "frame refused from=%s message=%r", worker.worker_id if worker else "unregistered", str(error)
            )
            if worker is None:
                self._send(peer, WorkerRefused(error=error.report()))
            else:
                self._not_heard(worker)
            return
        now_s = self._clock.now_s()
        if isinstance(message, RegisterWorker):
            self._register(message, peer, now_s)
            return
        if worker is None:
            self._send(peer, RegisterAgain())
            return
        worker.last_heard_s = now_s
        try:
            self._hear(worker, message, now_s)
        except Exception:
            logger.exception("message not handled from=%s", worker.worker_id)
            if isinstance(message, StepOutputs | PrefillFinished | LegFailed):
                self._not_heard(worker)

    def _hear(self, worker: Worker, message: WorkerMessage, now_s: float) -> None:
        match message:
            case StepOutputs():
                self._perform(self._core.step(worker, message, now_s))
            case PrefillFinished():
                self._perform(self._core.prefill_finished(worker, message, now_s))
            case Heartbeat():
                self._perform(self._core.heartbeat(worker, message, now_s))
            case KvEvents():
                self._perform(self._core.kv_events(worker, message, now_s))
            case LegFailed():
                self._perform(self._core.leg_failed(worker, message, now_s))
            case WorkerLeaving():
                self._leaving(worker, message, now_s)

    def _not_heard(self, worker: Worker) -> None:
        """Tokens may be lost, whose is not known: all its requests go on from what their clients have."""
        self._send(worker.peer, RegisterAgain())
        self._lose(worker.worker_id, "what it said could not be handled")

    def _look_for_lost(self) -> None:
        """A connection has ended, at once when its process was killed: whose was it?"""
        for worker in list(self._core.fleet):
            self._is_there(worker)

    def _is_there(self, worker: Worker) -> bool:
        if self._send(worker.peer, StillThere()):
            return True
        self._lose(worker.worker_id, "its connection is gone")
        return False

    def _lose(self, worker_id: str, reason: str) -> None:
        logger.warning("worker lost worker_id=%s reason=%r", worker_id, reason)
        self._perform(self._core.worker_lost(worker_id, reason, self._clock.now_s()))

    def _register(self, registration: RegisterWorker, peer: bytes, now_s: float) -> None:
        former = self._core.fleet.get(registration.worker_id)
        if former is not None and former.peer != peer:
            self._is_there(former)  # it may be the process before this one
        try:
            self._core.fleet.check(registration, peer)
        except ServingError as error:
            logger.warning("worker refused worker_id=%s message=%r", registration.worker_id, error.message)
            if not error.retryable:
                self._core.fleet.refused(registration, error.message)
            self._send(peer, WorkerRefused(error=error.report()))
            return
        actions = self._core.worker_registered(registration, peer, now_s)
        accepted = WorkerAccepted(
            protocol_version=codec.PROTOCOL_VERSION,
            coordinator_boot_id=self._boot_id,
            heartbeat_interval_s=self._heartbeat_interval_s,
        )
        self._send(peer, accepted)
        logger.info(
            "worker registered worker_id=%s role=%s boot_id=%s num_blocks=%d max_batch_size=%d model=%s",
            registration.worker_id, registration.role.value, registration.boot_id,
            registration.capacity.num_blocks, registration.capacity.max_batch_size,
            registration.layout.model,
        )  # fmt: skip
        for callback in self.on_worker_registered:
            callback(registration)
        self._perform(actions)

    def _leaving(self, worker: Worker, message: WorkerLeaving, now_s: float) -> None:
        logger.info("worker leaving worker_id=%s reason=%r", worker.worker_id, message.reason)
        if worker.is_leaving:  # the second word: its legs are done, it goes now
            self._perform(self._core.worker_lost(worker.worker_id, message.reason, now_s))
        else:
            self._perform(self._core.worker_leaving(worker))

    # ── carrying out ─────────────────────────────────────────────────────────────────────────

    def _perform(self, actions: Iterable[Action]) -> None:
        """In the order of the decisions: what follows from one that cannot be carried out comes after all
        that was decided before. One that breaks takes nobody else's with it."""
        self._undone.extend(actions)
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._undone:
                action = self._undone.popleft()
                try:
                    self._carry_out(action)
                except Exception:
                    logger.exception("action failed action=%s", type(action).__name__)
                    self._broke(action)
        finally:
            self._is_performing = False

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Deliver):
            action.sink.on_delta(action.delta, action.placement)
        elif isinstance(action, Send):
            self._send_to(action)
        else:
            self._finish(action)

    def _broke(self, action: Action) -> None:
        error = ServingError(OUR_MISTAKE)
        if isinstance(action, Deliver):
            self._perform(self._core.sink_broke(action.sink, error, self._clock.now_s()))
        elif isinstance(action, Send):
            self._not_sent(action, error)

    def _send_to(self, action: Send) -> None:
        worker = self._core.fleet.get(action.worker_id)
        if worker is None:
            return
        frame = codec.encode(action.message)
        limit = codec.MAX_MESSAGE_BYTES
        if len(frame) > limit:
            # The worker's socket would drop the connection over it, and all legs with it.
            reason = f"as a message to a worker the request has {len(frame)} bytes, the limit is {limit}"
            self._not_sent(action, InvalidRequest(reason))
        elif not self._fleet_channel.send(worker.peer, frame):
            self._lose(action.worker_id, "its connection is gone")

    def _not_sent(self, action: Send, error: ServingError) -> None:
        worker, message = self._core.fleet.get(action.worker_id), action.message
        if worker is not None and isinstance(message, StartPrefill | StartDecode):
            failed = LegFailed(handoff_id=message.handoff_id, error=error.report())
            self._perform(self._core.leg_failed(worker, failed, self._clock.now_s()))

    def _send(self, peer: bytes, message: Message) -> bool:
        return self._fleet_channel.send(peer, codec.encode(message))

    def _finish(self, action: Finish) -> None:
        try:
            self._record(action)
        finally:
            action.sink.on_finished(action.report)
            if self._core.num_requests == 0:
                self._idle.set()

    def _record(self, action: Finish) -> None:
        report = action.report
        if request_log.isEnabledFor(logging.INFO):
            logged = msgspec.structs.replace(report, prompt_logprobs=None)
            line = _RequestLogLine(
                request_id=action.request_id,
                handoff_id=action.handoff_id,
                whole_s=action.whole_s,
                report=logged,
            )
            request_log.info("%s", msgspec.json.encode(line).decode())
        if self._decision_log is not None:
            self._decision_log.write(action.request_id, action.records, report)
        for callback in self.on_finished:
            callback(report)


class _RequestLogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One JSON line tells a request's whole story."""

    event: str = "request finished"
    request_id: str
    handoff_id: str
    whole_s: float
    report: RequestReport


def _worker_snapshot(worker: Worker, now_s: float) -> dict[str, object]:
    registration, account = worker.registration, worker.account
    return {
        "worker_id": worker.worker_id,
        "role": worker.role.value,
        # Enough to see a restart; who knows the whole of it may take the worker's place.
        "boot_id": registration.boot_id[:6],
        "host": registration.host,
        "transfer_endpoint": registration.transfer_endpoint,
        "pid": registration.pid,
        "is_leaving": worker.is_leaving,
        "is_on_trial": worker.is_on_trial,
        "silent_s": round(now_s - worker.last_heard_s, 3),
        "tensor_parallel_size": registration.tensor_parallel_size,
        "pipeline_parallel_size": registration.pipeline_parallel_size,
        "layout": msgspec.to_builtins(registration.layout),
        "capacity": msgspec.to_builtins(registration.capacity),
        "load": msgspec.structs.asdict(account.load) | {"scheduler": _counters(account.load.scheduler)},
        "num_legs": account.num_legs,
        "num_queued_tokens": account.num_queued_tokens,
        "num_reserved_blocks": account.num_reserved_blocks,
    }


def _counters(counters: SchedulerCounters | None) -> dict[str, int] | None:
    return None if counters is None else msgspec.structs.asdict(counters)
