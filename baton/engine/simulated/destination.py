"""The decode half of simulated hand-offs: `baton.handoff.destination`, on a simulated link.

A leg that expects KV first waits for blocks, no longer than its lease (`expect`); then the blocks are
promised to the source (`reserve`). What the source writes is kept by position, and only when the machine
says that all is there it becomes the leg's KV, by following the writes from what the leg had. So a write
that is missing, or that belongs to another prompt, changes the answer.

Blocks of a reservation that came to nothing stay until the machine says that nobody can write to them any
more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.clock import Clock
from baton.contract.messages import KvSource
from baton.contract.tokens import TOKEN_BYTES
from baton.engine.simulated.link import Greeting, KvLanded, KvWritten, LinkMessage, Links
from baton.engine.simulated.model import kv_of
from baton.engine.simulated.ticker import Ticker
from baton.handoff.destination import (
    Activate,
    Cancel,
    CancelAcknowledged,
    DestinationAction,
    DestinationEvent,
    DestinationTable,
    FirstTokenArrived,
    Free,
    GiveUp,
    OwnerAborted,
    Probe,
    Register,
    Reserve,
    SourceFailed,
    SourceLost,
    SourceReassured,
    WriteArrived,
)
from baton.handoff.moves import ReservationState
from baton.handoff.timing import RESEND_S, SILENCE_S, TIMER_S
from baton.transfer.stream_wire import (
    CancelDone,
    CancelStream,
    FirstToken,
    RegisterStream,
    StreamFailed,
    StreamKnown,
)

logger = logging.getLogger(__name__)


class _Expectation:
    """A leg that waits for blocks."""

    __slots__ = ("end_s", "late_timer", "source")

    def __init__(self, source: KvSource, end_s: float, late_timer: asyncio.TimerHandle) -> None:
        self.source = source
        self.end_s = end_s
        self.late_timer = late_timer


@dataclass(slots=True)
class _Reservation:
    leg_id: str
    handoff_id: str
    """The source's name of it."""
    epoch: int
    source: str
    num_tokens: int
    num_skipped: int
    num_total: int
    skipped_kv: int
    lease_s: float
    wants_first_token: bool
    writes: dict[int, KvWritten] = field(default_factory=dict)
    """By first block."""

    @property
    def table_id(self) -> str:
        return f"{self.leg_id}#{self.epoch}"

    def kv(self) -> int:
        """Of all its blocks, as they were written."""
        position, kv = self.num_skipped, self.skipped_kv
        while position < self.num_total:
            written = self.writes.get(position)
            if written is None or written.from_kv != kv:
                return kv_of(b"what was in these blocks before", kv)
            position, kv = written.end, written.kv
        return kv


class SimulatedDestination:
    def __init__(
        self,
        clock: Clock,
        greeting: Greeting,
        block_size_tokens: int,
        *,
        on_kv: Callable[[str, int, int, int | None], None],
        on_no_kv: Callable[[str, str], None],
        on_free: Callable[[str], None],
    ) -> None:
        """on_kv(leg_id, kv, num_tokens, first_token): KV of so many prompt tokens. on_no_kv(leg_id, reason):
        none will come, and `is_exposed` says whether its blocks have to stay. on_free(leg_id) ends that."""
        self._clock = clock
        self._boot_id = greeting.boot_id
        self._block_size_tokens = block_size_tokens
        self._on_kv = on_kv
        self._on_no_kv = on_no_kv
        self._on_free = on_free
        self._links = Links(
            greeting,
            on_open=self._on_open,
            on_message=self._on_message,
            on_dead=self._on_dead,
            is_wanted=lambda source: any(r.source == source for r in self._reservations.values()),
        )
        self._table = DestinationTable(silence_s=SILENCE_S, resend_s=RESEND_S)
        self._expectations: dict[str, _Expectation] = {}
        self._reservations: dict[int, _Reservation] = {}
        """By epoch."""
        self._epoch_of: dict[str, int] = {}
        """Leg → its reservation."""
        self._epoch = 0
        self.num_stray_writes = 0
        """Into blocks that were not, or not any more, promised to their hand-off: always 0."""
        self._ticker = Ticker(TIMER_S, self._tick)

    def stop(self) -> None:
        """With the links gone nobody can write here any more."""
        self._ticker.stop()
        self._links.stop()
        for leg_id in list(self._expectations):
            self._end_expectation(leg_id)
        for reservation in list(self._reservations.values()):
            self._end(reservation)
            self._on_free(reservation.leg_id)

    # ── legs ─────────────────────────────────────────────────────────────────────────────────

    def expect(self, leg_id: str, source: KvSource) -> None:
        """Its lease runs from here."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, source.lease_s), self._on_late, leg_id)
        self._expectations[leg_id] = _Expectation(source, self._clock.now_s() + source.lease_s, timer)

    def reserve(
        self, leg_id: str, packed_prompt: bytes, num_tokens_here: int, *, late_s: float = 0.0
    ) -> None:
        """The leg has blocks, and so many tokens of the prompt in the first of them. `late_s`: wait before
        the source is told."""
        if late_s > 0:
            asyncio.get_running_loop().call_later(
                late_s, self._reserve, leg_id, packed_prompt, num_tokens_here
            )
        else:
            self._reserve(leg_id, packed_prompt, num_tokens_here)

    def _reserve(self, leg_id: str, packed_prompt: bytes, num_tokens_here: int) -> None:
        expectation = self._end_expectation(leg_id)
        if expectation is None:
            return  # it was aborted, or is too late
        source, params = expectation.source, expectation.source.transfer_params
        endpoint, boot_id = params.get("endpoint"), params.get("boot_id")
        num_tokens = source.num_tokens
        if not isinstance(endpoint, str) or not isinstance(boot_id, str):
            self._on_no_kv(leg_id, "transfer_params name no endpoint and boot_id")
            return
        lease_s = expectation.end_s - self._clock.now_s()
        if lease_s <= 0:
            self._on_no_kv(leg_id, f"no KV within the lease of {source.lease_s:.3f} s")
            return
        size = self._block_size_tokens
        num_skipped, num_total = num_tokens_here // size, -(-num_tokens // size)
        self._epoch += 1
        reservation = _Reservation(
            leg_id=leg_id,
            handoff_id=str(params.get("handoff_id", leg_id)),
            epoch=self._epoch,
            source=f"{endpoint}/{boot_id}",
            num_tokens=num_tokens,
            num_skipped=num_skipped,
            num_total=num_total,
            skipped_kv=kv_of(memoryview(packed_prompt)[: num_skipped * size * TOKEN_BYTES]),
            lease_s=lease_s,
            wants_first_token=source.has_first_token,
        )
        self._reservations[self._epoch] = reservation
        self._epoch_of[leg_id] = self._epoch
        self._links.open(reservation.source)
        self._ticker.wake()
        self._tell(
            Reserve(
                handoff_id=reservation.table_id,
                epoch=reservation.epoch,
                sources=(reservation.source,),
                lease_s=reservation.lease_s,
                wants_first_token=reservation.wants_first_token,
            )
        )

    def is_exposed(self, leg_id: str) -> bool:
        """A source may write to its blocks."""
        return leg_id in self._epoch_of

    def abort(self, leg_id: str) -> None:
        """Its owner wants no KV any more. Exposed blocks stay until `on_free`."""
        self._end_expectation(leg_id)
        epoch = self._epoch_of.get(leg_id)
        if epoch is not None:
            self._tell(OwnerAborted(self._reservations[epoch].table_id))

    def reset(self, leg_id: str) -> None:
        """Break the connection to its source."""
        self._links.reset(self._reservations[self._epoch_of[leg_id]].source)

    def _on_late(self, leg_id: str) -> None:
        expectation = self._end_expectation(leg_id)
        if expectation is not None:
            self._on_no_kv(leg_id, f"no KV within the lease of {expectation.source.lease_s:.3f} s")

    def _end_expectation(self, leg_id: str) -> _Expectation | None:
        expectation = self._expectations.pop(leg_id, None)
        if expectation is not None:
            expectation.late_timer.cancel()
        return expectation

    # ── sources ──────────────────────────────────────────────────────────────────────────────

    def _on_open(self, source: str) -> None:
        """Nothing we said before has arrived, or only before the connection broke."""
        for reservation in list(self._reservations.values()):
            if reservation.source == source:
                if self._table.state(reservation.table_id) is ReservationState.QUARANTINED:
                    self._send_cancel(reservation)
                else:
                    self._send_registration(reservation)

    def _on_message(self, source: str, message: LinkMessage) -> None:
        if isinstance(message, Greeting | KvLanded | RegisterStream | CancelStream):
            logger.warning("kv notice dropped: %s is for sources", type(message).__name__)
            return
        notice = message.notice if isinstance(message, KvWritten) else message
        if isinstance(message, KvWritten):
            self._links.send(source, KvLanded(notice.handoff_id, notice.epoch, message.notice.seq))
        reservation = self._reservations.get(notice.epoch)
        if reservation is None or reservation.handoff_id != notice.handoff_id:
            if isinstance(message, KvWritten):
                self.num_stray_writes += 1
                logger.error("kv written into blocks that are not promised: handoff_id=%s", notice.handoff_id)
            return
        table_id, epoch = reservation.table_id, reservation.epoch
        match message:
            case KvWritten(notice=notice):
                reservation.writes[message.start] = message
                self._tell(
                    WriteArrived(
                        handoff_id=table_id, epoch=epoch, source=source, seq=notice.seq, total=notice.total
                    )
                )
            case FirstToken(token_id=token_id):
                self._tell(
                    FirstTokenArrived(handoff_id=table_id, epoch=epoch, source=source, token_id=token_id)
                )
            case StreamKnown() if reservation.num_skipped >= reservation.num_total:
                # All of it was here: there is nothing to write, and the source knows that it is not needed.
                self._tell(WriteArrived(handoff_id=table_id, epoch=epoch, source=source, seq=0, total=1))
            case StreamKnown():
                self._tell(SourceReassured(handoff_id=table_id, epoch=epoch, source=source))
            case StreamFailed(reason=reason):
                self._tell(SourceFailed(handoff_id=table_id, epoch=epoch, source=source, reason=reason))
            case CancelDone():
                self._tell(CancelAcknowledged(handoff_id=table_id, epoch=epoch, source=source))

    def _on_dead(self, source: str, reason: str) -> None:
        logger.warning("kv source lost: %s", reason)
        self._tell(SourceLost(source))

    # ── the machine ──────────────────────────────────────────────────────────────────────────

    def _tick(self) -> bool:
        self._carry_out(self._table.on_time(self._clock.now_s()))
        return bool(self._reservations)

    def _tell(self, event: DestinationEvent) -> None:
        self._carry_out(self._table.on_event(event, self._clock.now_s()))

    def _carry_out(self, actions: list[DestinationAction]) -> None:
        for action in actions:
            match action:
                case Register(_, epoch, source):
                    if self._links.open(source):
                        self._send_registration(self._reservations[epoch])
                case Cancel(_, epoch, source):
                    # Not after the source's own word that it is over.
                    if epoch in self._reservations and self._links.open(source):
                        self._send_cancel(self._reservations[epoch])
                case Activate(table_id, first_token):
                    reservation = self._reservations[_epoch(table_id)]
                    self._end(reservation)
                    self._on_kv(reservation.leg_id, reservation.kv(), reservation.num_tokens, first_token)
                case GiveUp(table_id, reason):
                    reservation = self._reservations[_epoch(table_id)]
                    if self._table.state(table_id) is None:
                        self._end(reservation)  # and nobody can write there any more
                    self._on_no_kv(reservation.leg_id, reason)
                case Free(table_id):
                    freed = self._reservations.get(_epoch(table_id))
                    if freed is not None:
                        self._end(freed)
                        self._on_free(freed.leg_id)
                case Probe(source):
                    self._links.probe(source)

    def _send_registration(self, reservation: _Reservation) -> None:
        self._links.send(
            reservation.source,
            RegisterStream(
                handoff_id=reservation.handoff_id,
                destination=self._boot_id,
                epoch=reservation.epoch,
                num_destinations=1,
                num_skipped=reservation.num_skipped,
                block_ids=list(range(reservation.num_skipped, reservation.num_total)),
                ttl_s=reservation.lease_s,
                wants_first_token=reservation.wants_first_token,
            ),
        )

    def _send_cancel(self, reservation: _Reservation) -> None:
        self._links.send(
            reservation.source,
            CancelStream(
                handoff_id=reservation.handoff_id, destination=self._boot_id, epoch=reservation.epoch
            ),
        )

    def _end(self, reservation: _Reservation) -> None:
        del self._reservations[reservation.epoch]
        del self._epoch_of[reservation.leg_id]


def _epoch(table_id: str) -> int:
    return int(table_id.rpartition("#")[2])
