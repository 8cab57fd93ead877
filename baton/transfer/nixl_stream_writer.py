"""The prefill rank's thread for streams: it posts WRITEs, watches them and answers destinations.

The model thread only leaves facts in a queue. That matters twice. Posting copies the bytes on hosts
where memory is copied by the poster, and a completion notice leaves the process only when somebody looks
at a write that did not complete at once: with nobody looking, the destination would wait for a whole
step of the next prompt. So this thread looks, every millisecond while writes are in flight and some
times a second otherwise. It needs an agent with strict locking (the model thread calls NIXL too).

CUDA: a fact carries an event recorded after the layer's kernels were queued, and the thread waits for it
before it posts: a WRITE reads the blocks from outside the stream's order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from baton.handoff.source import (
    AcknowledgeCancel,
    CancelReceived,
    DestinationLost,
    DestinationRegistered,
    Fail,
    GiveFirstToken,
    Reassure,
    Release,
    SourceAction,
    SourceEvent,
    SourceTable,
    StreamKey,
    Write,
    WriteEnded,
)
from baton.handoff.timing import TIMER_S
from baton.transfer.nixl_stream_peers import KvMemory, LayoutsDiffer, StreamPeer
from baton.transfer.stream_wire import (
    BlocksWritten,
    CancelDone,
    CancelStream,
    FirstToken,
    Hello,
    RegisterStream,
    StreamFailed,
    StreamKnown,
    StreamMessage,
    decode,
    encode,
)

logger = init_logger(f"vllm.{__name__}")

BUSY_POLL_S = 0.0005
"""Writes are in flight."""
STREAM_POLL_S = 0.004
"""Streams exist; their next fact comes from the model thread and wakes us."""
IDLE_POLL_S = 0.05
"""Nothing to do but to answer a destination that cancels or registers."""
PREEMPTION_PATIENCE_S = 30.0
JOIN_TIMEOUT_S = 5.0


class NoticeSorter:
    """Two readers, one mailbox: takes NIXL's notices and keeps streams' apart from vLLM's."""

    def __init__(self, agent: Any, is_ours: Callable[[bytes], bool]) -> None:
        self._take = agent.get_new_notifs
        self._is_ours = is_ours
        self._lock = threading.Lock()
        self._stock: dict[str, list[bytes]] = {}
        self._ours: deque[bytes] = deque()
        self.is_agent_busy = False
        """A write is being posted, which may copy its bytes, and whoever calls the agent would wait for that.
        The model thread must not: it has a token to sample. It hears of notices in its next step."""
        agent.get_new_notifs = self.take_stock

    def take_stock(self) -> dict[str, list[bytes]]:
        """What vLLM's own code sees."""
        with self._lock:
            if not self.is_agent_busy:
                self._sort()
            stock, self._stock = self._stock, {}
        return stock

    def has_ours(self) -> bool:
        with self._lock:
            self._sort()
            return bool(self._ours)

    def take_ours(self) -> list[bytes]:
        with self._lock:
            self._sort()
            ours = list(self._ours)
            self._ours.clear()
        return ours

    def _sort(self) -> None:
        for agent_name, notices in self._take().items():
            for notice in notices:
                if self._is_ours(notice):
                    self._ours.append(notice)
                else:
                    self._stock.setdefault(agent_name, []).append(notice)


@dataclass(slots=True)
class _Computed:
    """A fact from the model thread, with the CUDA event after which it is true."""

    fact: SourceEvent
    event: Any = None


@dataclass(slots=True)
class _InFlight:
    handle: Any
    key: StreamKey
    seq: int
    posted_s: float
    is_good: bool = True
    """False: it failed or hangs, and only its release is awaited."""


@dataclass(slots=True)
class _Barrier:
    handoff_id: str
    is_quiet: threading.Event


class StreamWriter:
    """Owns the source table, the peers and every NIXL call for streams."""

    def __init__(
        self,
        agent: Any,
        table: SourceTable,
        own: KvMemory,
        memory_type: str,
        notices: NoticeSorter,
        *,
        refusal: str | None,
        patience_s: float,
        on_write: Callable[[int, float], None],
    ) -> None:
        """`refusal`: why this engine cannot stream at all; every registration then fails with it.
        `patience_s`: a write that takes longer hangs; it is cancelled, and its stream fails."""
        self._agent = agent
        self._name: str = agent.name
        self._table = table
        self._own = own
        self._memory_type = memory_type
        self._notices = notices
        self._refusal = refusal
        self._patience_s = patience_s
        self._on_write = on_write
        self._inbox: queue.SimpleQueue[_Computed | _Barrier | None] = queue.SimpleQueue()
        self._released: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._peers: dict[str, StreamPeer] = {}
        self._in_flight: list[_InFlight] = []
        self._barriers: list[_Barrier] = []
        self._lost: set[str] = set()
        self._refused: dict[str, str] = {}
        self._is_dead = False
        self._timer_s = 0.0
        self._thread = threading.Thread(target=self._run, name="kv-stream-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join(JOIN_TIMEOUT_S)

    # ── for the model thread ──────────────────────────────────────────────────────────────────

    def tell(self, fact: SourceEvent, event: Any = None) -> None:
        self._inbox.put(_Computed(fact, event))

    def wait_until_quiet(self, handoff_id: str) -> None:
        """After PrefillPreempted, before the blocks are used again. Raises RuntimeError: a write hangs,
        and going on would send another prompt's KV."""
        barrier = _Barrier(handoff_id, threading.Event())
        self._inbox.put(barrier)
        if not barrier.is_quiet.wait(PREEMPTION_PATIENCE_S):
            raise RuntimeError(
                f"a write of {handoff_id} did not end within {PREEMPTION_PATIENCE_S:.0f} s of its preemption"
            )

    def take_released(self) -> list[str]:
        """Hand-offs whose blocks may be freed. Raises RuntimeError: the thread is dead."""
        if self._is_dead:
            raise RuntimeError("the KV stream writer has ended; its log line says why")
        released = []
        while not self._released.empty():
            released.append(self._released.get())
        return released

    # ── the thread ────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            # Outermost loop of the thread. Without it no block would ever be released again; the
            # model thread finds out in its next step and ends the engine.
            logger.exception("kv stream writer ended")
            self._is_dead = True

    def _turn(self) -> bool:
        try:
            item = self._inbox.get(timeout=self._poll_s())
        except queue.Empty:
            pass
        else:
            while True:
                if item is None:
                    return False
                self._take(item)
                if self._inbox.empty():
                    break
                item = self._inbox.get()
        for notice in self._notices.take_ours():
            self._on_notice(notice)
        self._check_writes()
        now_s = time.monotonic()
        if now_s - self._timer_s >= TIMER_S:
            self._timer_s = now_s
            self._carry_out(self._table.on_time(now_s))
        self._open_barriers()
        return True

    def _poll_s(self) -> float:
        if self._in_flight or self._barriers:
            return BUSY_POLL_S
        return IDLE_POLL_S if self._table.is_idle else STREAM_POLL_S

    def _take(self, item: _Computed | _Barrier) -> None:
        if isinstance(item, _Barrier):
            self._barriers.append(item)
            return
        if item.event is not None:
            item.event.synchronize()
        self._on_fact(item.fact)

    def _on_fact(self, fact: SourceEvent) -> None:
        self._carry_out(self._table.on_event(fact, time.monotonic()))

    def _open_barriers(self) -> None:
        for barrier in list(self._barriers):
            if not self._table.num_in_flight(barrier.handoff_id):
                barrier.is_quiet.set()
                self._barriers.remove(barrier)

    # ── destinations ──────────────────────────────────────────────────────────────────────────

    def _on_notice(self, notice: bytes) -> None:
        try:
            message = decode(notice)
        except ValueError as error:
            logger.warning("kv stream notice dropped: %s", error)
            return
        match message:
            case Hello():
                self._greet(message)
            case RegisterStream():
                self._register(message)
            case CancelStream():
                key = StreamKey(message.handoff_id, message.destination, message.epoch)
                self._on_fact(CancelReceived(key))
            case _:
                logger.warning("kv stream notice dropped: %s is for destinations", type(message).__name__)

    def _greet(self, hello: Hello) -> None:
        name = hello.destination
        if name in self._peers or name in self._refused:
            return
        try:
            if self._refusal is not None:
                raise LayoutsDiffer(self._refusal)
            self._peers[name] = StreamPeer(self._agent, self._memory_type, self._own, hello)
        except LayoutsDiffer as error:
            logger.error("kv stream refused: destination=%s %s", name, error)
            self._refused[name] = str(error)
            self._agent.add_remote_agent(hello.agent_metadata)  # so that the refusal can be told

    def _register(self, message: RegisterStream) -> None:
        key = StreamKey(message.handoff_id, message.destination, message.epoch)
        if reason := self._refused.get(key.destination):
            self._send(key.destination, _failed(self._name, key, reason))
            return
        if key.destination not in self._peers:
            return  # its Hello was lost; it will say both again
        self._on_fact(
            DestinationRegistered(
                key=key,
                num_destinations=message.num_destinations,
                block_ids=message.block_ids,
                num_skipped=message.num_skipped,
                ttl_s=message.ttl_s,
                wants_first_token=message.wants_first_token,
            )
        )

    def _send(self, destination: str, message: StreamMessage) -> None:
        if destination in self._lost:
            return
        try:
            self._agent.send_notif(destination, notif_msg=encode(message))
        except Exception as error:  # NIXL's own types; the peer is gone or never was
            logger.warning("kv stream notice not sent: destination=%s %s", destination, error)

    # ── actions ───────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, actions: list[SourceAction]) -> None:
        pending = deque(actions)
        while pending:
            action = pending.popleft()
            match action:
                case Write():
                    pending.extendleft(reversed(self._post(action)))
                case GiveFirstToken(key, token_id):
                    self._send(
                        key.destination,
                        FirstToken(
                            handoff_id=key.handoff_id, source=self._name, epoch=key.epoch, token_id=token_id
                        ),
                    )
                case Release(handoff_id):
                    self._released.put(handoff_id)
                case Fail(key, reason):
                    logger.warning("kv stream ended: handoff_id=%s reason=%s", key.handoff_id, reason)
                    self._send(key.destination, _failed(self._name, key, reason))
                case AcknowledgeCancel(key):
                    self._send(
                        key.destination,
                        CancelDone(handoff_id=key.handoff_id, source=self._name, epoch=key.epoch),
                    )
                case Reassure(key):
                    self._send(
                        key.destination,
                        StreamKnown(handoff_id=key.handoff_id, source=self._name, epoch=key.epoch),
                    )

    def _post(self, write: Write) -> list[SourceAction]:
        """Starts one WRITE. Where the poster copies it is over when this returns."""
        key = write.key
        handle = None
        started_s = time.monotonic()
        try:
            notice = BlocksWritten(
                handoff_id=key.handoff_id,
                source=self._name,
                epoch=key.epoch,
                seq=write.seq,
                total=write.total,
            )
            handle = self._peers[key.destination].prepare_write(
                write.layers, write.source_blocks, write.destination_blocks, encode(notice)
            )
            self._notices.is_agent_busy = True
            state = self._agent.transfer(handle)
        except Exception as error:  # whatever NIXL throws about this write or its peer
            logger.warning("kv write failed: handoff_id=%s seq=%d %s", key.handoff_id, write.seq, error)
            state = "ERR"
        finally:
            self._notices.is_agent_busy = False
        if state == "DONE":
            self._on_write(len(write.source_blocks) * len(write.layers), time.monotonic() - started_s)
        flight = _InFlight(handle, key, write.seq, started_s, is_good=state != "ERR")
        if state == "DONE" and self._let_go(flight):
            return self._table.on_event(WriteEnded(key, write.seq, True), time.monotonic())
        self._in_flight.append(flight)
        return []

    def _check_writes(self) -> None:
        for flight in list(self._in_flight):
            if flight.is_good:
                try:
                    state = self._agent.check_xfer_state(flight.handle)
                except Exception as error:  # NIXL's own types
                    logger.warning("kv write failed: handoff_id=%s %s", flight.key.handoff_id, error)
                    state = "ERR"
                if state == "PROC":
                    took_s = time.monotonic() - flight.posted_s
                    if took_s < self._patience_s:
                        continue
                    logger.warning(
                        "kv write given up: handoff_id=%s seq=%d took_s=%.1f",
                        flight.key.handoff_id, flight.seq, took_s,
                    )  # fmt: skip
                flight.is_good = state == "DONE"
            if not self._let_go(flight):
                continue
            self._in_flight.remove(flight)
            self._on_fact(WriteEnded(flight.key, flight.seq, flight.is_good))
            if not flight.is_good:
                self._doubt(flight.key.destination)

    def _let_go(self, flight: _InFlight) -> bool:
        """False: NIXL will not release it, so its bytes may still move. Tried again in the next turn."""
        if flight.handle is None:
            return True
        try:
            self._agent.release_xfer_handle(flight.handle)
        except Exception as error:  # NIXL's own types
            # Every half millisecond, so not at a level that is shown.
            logger.debug("kv write not released: handoff_id=%s %s", flight.key.handoff_id, error)
            return False
        return True

    def _doubt(self, destination: str) -> None:
        """A write failed. If NIXL has dropped the peer, so do we: a worker that starts again is another."""
        if destination in self._lost or destination not in self._peers:
            return
        try:
            is_known = self._agent.check_remote_metadata(destination)
        except Exception:  # NIXL's own types
            is_known = False
        if is_known:
            return
        logger.warning("kv stream destination lost: %s", destination)
        self._lost.add(destination)
        self._on_fact(DestinationLost(destination))
        del self._peers[destination]  # its descriptors go with the agent that NIXL has dropped already


def _failed(source: str, key: StreamKey, reason: str) -> StreamFailed:
    return StreamFailed(handoff_id=key.handoff_id, source=source, epoch=key.epoch, reason=reason)
