"""One worker: an engine on one side, a coordinator on the other.

`start` brings the engine up, `serve` registers and works until there is a reason to go, `drain`
finishes what runs and leaves. Engine events and messages are handled by plain callbacks on the
event loop; the only task is the one that calls the three methods, and it does what depends on time
(registering, heartbeats, deadlines).

Every attempt to register opens a new connection. So whatever was queued for a coordinator that is
gone is dropped with the old connection, instead of meeting its successor; the successor has never
heard of those legs. The legs themselves are aborted at once, when the connection ends or the successor
asks who we are: their clients were connected to the coordinator that is gone. KV that a prefill worker
holds is not: somebody may be reading it. It is freed by its lease.

What the engine's prefix cache gains and loses is numbered by the journal and told as it happens. A
coordinator that has just accepted us is told all of it: it may be new, or may have missed some.

Full queue towards the coordinator: it has not read for a minute or more; it is treated as lost.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from enum import Enum

import msgspec

from baton.clock import Clock
from baton.contract import codec
from baton.contract.errors import EngineFailed, ErrorReport, ProtocolMismatch
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    AbortLeg,
    AskKvReplay,
    CoordinatorMessage,
    DrainWorker,
    Heartbeat,
    JoinTestPassed,
    KvEvent,
    KvEvents,
    LegFailed,
    Message,
    NoMoreLegs,
    PrefillFinished,
    RegisterAgain,
    RegisterWorker,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    StillThere,
    WorkerAccepted,
    WorkerLeaving,
    WorkerRefused,
)
from baton.engine.base import Engine, EngineDescription, FinishedPrefill
from baton.telemetry import LIFECYCLE_LOGGER, event
from baton.wire.channels import DealerChannel
from baton.worker.kv_journal import Batch, KvJournal
from baton.worker.legs import Drop, LegTable, Refuse
from baton.worker.registration import Registration, RegistrationState

logger = logging.getLogger("baton.worker")
lifecycle = logging.getLogger(LIFECYCLE_LOGGER)

HELD_KV_INTERVAL_S = 0.1
"""How often a draining prefill worker looks whether its KV has been read: engines do not tell."""

DEFAULT_HEARTBEAT_INTERVAL_S = 1.0

CLOSE_LINGER_MS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    worker_id: str
    boot_id: str
    """New for each process."""
    role: WorkerRole
    host: str
    pid: int


class EndOfServing(Enum):
    DRAIN_ASKED = "drain asked"
    ENGINE_DEAD = "engine dead"
    REFUSED = "refused"


class WorkerRuntime:
    """Implements EngineListener."""

    def __init__(
        self,
        engine: Engine,
        identity: WorkerIdentity,
        coordinator_address: str,
        clock: Clock,
        *,
        drain_timeout_s: float,
        prefill_window_tokens: int | None = None,
    ) -> None:
        self.identity = identity
        self.end: EndOfServing | None = None
        self.end_reason = ""
        self._engine = engine
        self._coordinator_address = coordinator_address
        self._clock = clock
        self._drain_timeout_s = drain_timeout_s
        self._prefill_window_tokens = prefill_window_tokens
        self._registration = Registration()
        self._heartbeat_interval_s = DEFAULT_HEARTBEAT_INTERVAL_S
        self._channel: DealerChannel | None = None
        self._changed = asyncio.Event()
        """Something happened that the task in `serve` or `drain` has to look at."""
        self._description: EngineDescription
        self._legs: LegTable
        self._journal = KvJournal()
        self._num_prefill_tokens_told = 0
        self._has_been_ready = False
        self._has_passed_join_test = False
        self._last_lease_end_s = 0.0
        self._num_farewells = 0
        self._is_draining = False
        self._is_dismissed = False
        """The coordinator wants nothing more of us."""

    # ── the three stages ─────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Raises EngineFailed with a sentence."""
        started_s = self._clock.now_s()
        self._description = await self._engine.start(self)
        capacity = self._description.capacity
        self._legs = LegTable(self.identity.role, max_model_len=capacity.max_model_len)
        event(
            logger, "engine started", start_s=self._clock.now_s() - started_s,
            engine=self._description.layout.engine, num_blocks=capacity.num_blocks,
            max_model_len=capacity.max_model_len, max_batch_size=capacity.max_batch_size,
            transfer_endpoint=self._description.transfer_endpoint or None,
        )  # fmt: skip

    async def serve(self) -> EndOfServing:
        """Until somebody asks for a drain, the engine dies, or the coordinator refuses us for good."""
        while self.end is None:
            if self._registration.state is RegistrationState.UNREGISTERED:
                wait_s = self._registration.seconds_to_attempt(self._clock.now_s())
                if wait_s == 0:
                    self._register()
                    continue
            else:
                self._heartbeat()
                wait_s = self._heartbeat_interval_s
            await self._change_within(wait_s)
        return self.end

    async def drain(self) -> None:
        """Finish the legs in flight and those that were promised, such as the decode leg of a prompt that is
        being computed elsewhere; on a prefill worker wait for held KV to be read or its lease to end; all
        within the drain timeout. Then stop the engine. What is left is aborted."""
        self._is_draining = True
        deadline_s = self._clock.now_s() + self._drain_timeout_s
        event(lifecycle, "drain started", reason=self.end_reason, num_legs=len(self._legs))
        self._say_leaving()
        while self.end is not EndOfServing.ENGINE_DEAD and (
            len(self._legs) or self._are_legs_coming() or self._is_kv_held()
        ):
            left_s = deadline_s - self._clock.now_s()
            if left_s <= 0:
                event(logger, "drain timed out", level=logging.WARNING, num_legs=len(self._legs))
                break
            self._heartbeat()
            wait_s = HELD_KV_INTERVAL_S if self._is_dismissed else self._heartbeat_interval_s
            await self._change_within(min(left_s, wait_s))
        await self.stop()

    async def stop(self) -> None:
        """Fail what still runs, free the engine, say good-bye. Idempotent."""
        await self._engine.stop()
        if self._channel is not None:
            while self._num_farewells < 2:
                self._say_leaving()
            self._channel.close(linger_ms=CLOSE_LINGER_MS)
            self._channel = None
            event(lifecycle, "worker stopped", reason=self.end_reason)

    def request_drain(self, reason: str) -> None:
        """May be called at any time, before `start` too; `serve` then ends."""
        self._finish(EndOfServing.DRAIN_ASKED, reason)

    async def end_requested(self) -> None:
        """Returns once `end` is set; for whoever must stop waiting for `start`."""
        while self.end is None:
            self._changed.clear()
            await self._changed.wait()

    def _finish(self, end: EndOfServing, reason: str) -> None:
        # A dead engine outranks a drain that is going on.
        if self.end is None or end is EndOfServing.ENGINE_DEAD:
            self.end, self.end_reason = end, reason
        self._changed.set()

    async def _change_within(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            pass
        self._changed.clear()

    def _are_legs_coming(self) -> bool:
        """A coordinator that knows us has not said otherwise."""
        return self._registration.is_registered and not self._is_dismissed

    def _is_kv_held(self) -> bool:
        """A lease is running and the engine has not got all its blocks back."""
        if self._clock.now_s() >= self._last_lease_end_s:
            return False
        return self._engine.load().num_free_blocks < self._description.capacity.num_blocks

    # ── to the coordinator ───────────────────────────────────────────────────────────────────

    def _register(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._registration.num_attempts > 0:
            event(
                logger, "waiting for coordinator", address=self._coordinator_address,
                num_attempts=self._registration.num_attempts,
            )  # fmt: skip
        self._channel = DealerChannel(self._on_frames, on_disconnected=self._on_disconnected)
        self._channel.connect(self._coordinator_address)
        self._channel.start()
        self._registration.attempted(self._clock.now_s())
        description, identity = self._description, self.identity
        registration = RegisterWorker(
            protocol_version=codec.PROTOCOL_VERSION,
            worker_id=identity.worker_id,
            boot_id=identity.boot_id,
            role=identity.role,
            layout=description.layout,
            capacity=description.capacity,
            tensor_parallel_size=description.tensor_parallel_size,
            pipeline_parallel_size=description.pipeline_parallel_size,
            transfer_endpoint=description.transfer_endpoint,
            host=identity.host,
            pid=identity.pid,
            prefill_window_tokens=self._prefill_window_tokens,
            stream_params=description.stream_params,
            streams_first_token=description.streams_first_token,
            has_kv_events=description.has_kv_events,
            has_passed_join_test=self._has_passed_join_test,
            sent_s=self._clock.now_s(),
        )
        self._channel.send(codec.encode(registration))

    def _heartbeat(self) -> None:
        now_s = self._clock.now_s()
        self._send(Heartbeat(load=self._engine.load(), num_legs=len(self._legs), sent_s=now_s))

    def _send_kv_events(self, batches: list[Batch]) -> None:
        load = self._engine.load()
        self._num_prefill_tokens_told = load.num_prefill_tokens_done
        for batch in batches:
            self._send(
                KvEvents(
                    sequence=batch.sequence,
                    events=batch.events,
                    load=load,
                    is_fresh_start=batch.is_fresh_start,
                )
            )

    def _send(self, message: Message) -> None:
        """To a coordinator that knows us; otherwise the message has no reader and is dropped."""
        if self._channel is None or not self._registration.is_registered:
            return
        frame = codec.encode(message)
        if len(frame) > codec.MAX_MESSAGE_BYTES:
            self._refuse_to_send(message, len(frame))
        elif not self._channel.send(frame):
            self._coordinator_lost("its queue is full: it does not read")

    def _refuse_to_send(self, message: Message, num_bytes: int) -> None:
        """ZeroMQ would drop the connection, and all legs with it, over one message."""
        reason = f"{type(message).__name__} has {num_bytes} bytes, the limit is {codec.MAX_MESSAGE_BYTES}"
        event(logger, "message too large", level=logging.ERROR, reason=reason)
        match message:
            case PrefillFinished():
                handoff_ids = [message.delta.handoff_id]
            case StepOutputs():
                handoff_ids = [delta.handoff_id for delta in message.deltas]
            case _:
                handoff_ids = []
        for handoff_id in handoff_ids:
            self._legs.end(handoff_id)
            self._engine.abort(handoff_id)
            self._send(LegFailed(handoff_id=handoff_id, error=EngineFailed(reason).report()))

    def _say_leaving(self) -> None:
        """Once: no new legs, please. Twice: this worker is gone."""
        self._num_farewells += 1
        self._send(WorkerLeaving(reason=self.end_reason))

    def _on_disconnected(self) -> None:
        """Of the connection in use: one that was closed tells nothing any more."""
        self._coordinator_lost("its connection is gone")

    def _coordinator_lost(self, reason: str) -> None:
        if not self._registration.lost():
            return
        legs = self._legs.abandon_all()
        event(logger, "coordinator lost", level=logging.WARNING, reason=reason, num_legs=len(legs))
        for leg in legs:
            # Whoever kept the account is gone: what was computed for whom is known here only.
            event(logger, "leg abandoned", handoff_id=leg.handoff_id, request_id=leg.request_id,
                  num_tokens=leg.num_output_tokens)  # fmt: skip
            self._engine.abort(leg.handoff_id)
        self._changed.set()

    # ── from the coordinator ─────────────────────────────────────────────────────────────────

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise ProtocolMismatch(f"a message is one frame, got {len(frames)}")
            message = codec.coordinator_messages.decode(frames[0])
        except ProtocolMismatch as error:
            event(logger, "frame dropped", level=logging.WARNING, reason=error)
            return
        self._on_message(message)

    def _on_message(self, message: CoordinatorMessage) -> None:
        match message:
            case WorkerAccepted():
                self._on_accepted(message)
            case WorkerRefused():
                self._on_refused(message.error)
            case RegisterAgain():
                self._coordinator_lost("it does not know us: it restarted or gave us up")
            case _ if not self._registration.is_registered:
                event(logger, "message dropped", reason="not registered", message=type(message).__name__)
            case StartPrefill() | StartDecode():
                self._on_start(message)
            case AbortLeg():
                self._engine.abort(message.handoff_id)
            case JoinTestPassed():
                self._has_passed_join_test = True
            case StillThere():
                pass
            case AskKvReplay():
                batches = self._journal.again(message.first, message.last)
                event(logger, "kv events asked for again", first=message.first, last=message.last,
                      num_batches=len(batches))  # fmt: skip
                self._send_kv_events(batches)
            case NoMoreLegs():
                self._is_dismissed = True
                self._changed.set()
            case DrainWorker():
                self.request_drain("the coordinator asked for it")

    def _on_accepted(self, message: WorkerAccepted) -> None:
        if self._registration.is_registered:
            return
        self._registration.accepted()
        # With an absurd interval we would flood the coordinator, or be given up by it.
        if 0.01 <= message.heartbeat_interval_s <= 60.0:
            self._heartbeat_interval_s = message.heartbeat_interval_s
        event(
            lifecycle, "worker registered again" if self._has_been_ready else "worker ready",
            worker_id=self.identity.worker_id, boot_id=self.identity.boot_id,
            role=self.identity.role.value, coordinator=self._coordinator_address,
            coordinator_boot_id=message.coordinator_boot_id,
        )  # fmt: skip
        self._has_been_ready = True
        self._send_kv_events(self._journal.fresh_start())
        self._changed.set()

    def _on_refused(self, error: ErrorReport) -> None:
        if self._registration.is_registered:  # accepted, tried, and found to answer wrong
            event(logger, "join test failed", level=logging.ERROR, code=error.code, reason=error.message)
            self._finish(EndOfServing.REFUSED, error.message)
            return
        self._registration.refused(error, self._clock.now_s())
        event(logger, "registration refused", level=logging.ERROR, code=error.code, reason=error.message)
        if self._registration.state is RegistrationState.REFUSED:
            self._finish(EndOfServing.REFUSED, error.message)

    def _on_start(self, message: StartPrefill | StartDecode) -> None:
        action = self._legs.on_start(message, self._clock.now_s())
        if isinstance(action, Drop):
            event(logger, "message dropped", handoff_id=message.handoff_id, reason=action.reason)
        elif isinstance(action, Refuse):
            error = action.error
            event(logger, "leg refused", handoff_id=message.handoff_id, request_id=message.request_id,
                  code=error.code, reason=error.message)  # fmt: skip
            self._send(LegFailed(handoff_id=message.handoff_id, error=error.report()))
        else:
            event(logger, "leg started", handoff_id=message.handoff_id, request_id=message.request_id,
                  num_prompt_tokens=action.leg.num_prompt_tokens)  # fmt: skip
            try:
                if isinstance(message, StartPrefill):
                    self._engine.start_prefill(message)
                else:
                    self._engine.start_decode(with_lease_left(message, self._clock.now_s()))
            except Exception as error:  # not foreseen by the engine: nobody else would say that it is over
                logger.exception("leg broke handoff_id=%s", message.handoff_id)
                self._engine.abort(message.handoff_id)
                reason = f"the engine broke on this request: {error!r}"
                self.on_leg_failed(message.handoff_id, EngineFailed(reason).report())

    # ── from the engine ──────────────────────────────────────────────────────────────────────

    def on_step(self, deltas: list[SequenceDelta]) -> None:
        known, ended = self._legs.on_step(deltas)
        load = self._engine.load()
        if known or load.num_prefill_tokens_done != self._num_prefill_tokens_told:
            self._num_prefill_tokens_told = load.num_prefill_tokens_done
            self._send(StepOutputs(deltas=known, load=load))
        if ended:
            now_s = self._clock.now_s()
            for leg, finish_reason in ended:
                event(logger, "leg finished", handoff_id=leg.handoff_id, request_id=leg.request_id,
                      leg_s=now_s - leg.started_s, finish_reason=finish_reason,
                      num_tokens=leg.num_output_tokens)  # fmt: skip
            self._legs_ended()

    def on_kv_events(self, events: list[KvEvent]) -> None:
        self._send_kv_events([self._journal.append(events)])

    def on_prefill_finished(self, finished: FinishedPrefill) -> None:
        leg = self._legs.end(finished.delta.handoff_id)
        if leg is None:
            # Abandoned meanwhile: nobody will fetch what the engine keeps.
            self._engine.abort(finished.delta.handoff_id)
            return
        now_s = self._clock.now_s()
        source = finished.kv_source
        if source is not None:
            # The lease counts from this moment, and the message leaves in it: nothing to subtract.
            self._last_lease_end_s = max(self._last_lease_end_s, now_s + source.lease_s)
        load = self._engine.load()
        self._num_prefill_tokens_told = load.num_prefill_tokens_done
        message = PrefillFinished(
            delta=finished.delta,
            kv_source=source,
            prompt_logprobs=finished.prompt_logprobs,
            queue_s=finished.queue_s,
            prefill_s=finished.prefill_s,
            load=load,
        )
        self._send(message)
        event(logger, "leg finished", handoff_id=leg.handoff_id, request_id=leg.request_id,
              leg_s=now_s - leg.started_s, kv_bytes=source.num_bytes if source else 0,
              num_tokens=len(finished.delta.token_ids))  # fmt: skip
        self._legs_ended()

    def on_leg_failed(self, handoff_id: str, error: ErrorReport) -> None:
        leg = self._legs.end(handoff_id)
        if leg is None:
            return
        event(logger, "leg failed", handoff_id=handoff_id, request_id=leg.request_id, code=error.code,
              reason=error.message, num_tokens=leg.num_output_tokens)  # fmt: skip
        self._send(LegFailed(handoff_id=handoff_id, error=error))
        self._legs_ended()

    def on_engine_dead(self, reason: str) -> None:
        event(logger, "engine died", level=logging.ERROR, reason=reason)
        self._finish(EndOfServing.ENGINE_DEAD, f"the engine died: {reason}")

    def _legs_ended(self) -> None:
        if self._is_draining and not len(self._legs):
            self._changed.set()


def with_lease_left(message: StartDecode, now_s: float) -> StartDecode:
    """With what is left of its lease after the time it lay in queues: this process, or one on its way,
    may have stood still for longer than the lease. Read then, the KV would be another prompt's."""
    source = message.kv_source
    if source is None or message.sent_s is None:
        return message
    age_s = max(0.0, now_s - message.sent_s)
    left = msgspec.structs.replace(source, lease_s=max(0.0, source.lease_s - age_s))
    return msgspec.structs.replace(message, kv_source=left)
