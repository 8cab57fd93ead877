"""The decode worker's half: blocks promised to a source, and when they may be used or freed.

A source writes into memory of this process. Its silence proves nothing: the write may be on its way. So
a reservation that is given up for whatever reason (the owner aborts, the lease ends, the source fell
silent) is *quarantined*, and its blocks are free only when every source has said that it will write no
more (it acknowledged the cancel, or ended the stream itself), has written all it had to, or is proven
dead. Freeing on a timeout would let a late write land in another request's blocks.

A reservation is complete when each source has sent as many different numbered notices as its last one
told; the last one alone proves nothing, notices may overtake each other. Where the first token was asked
for, each source owes that too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.handoff.moves import RESERVATION_MOVES, ReservationState, moved

# ── facts ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Blocks were taken for this hand-off; `sources` are the ranks that will write to them."""

    handoff_id: str
    epoch: int
    sources: tuple[str, ...]
    lease_s: float
    """How long the promise stands at most."""
    wants_first_token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteArrived:
    handoff_id: str
    epoch: int
    source: str
    seq: int
    total: int
    """Number of writes in all on the last one, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokenArrived:
    handoff_id: str
    epoch: int
    source: str
    token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReassured:
    handoff_id: str
    epoch: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFailed:
    """The source will not write any more, and nothing of it is in flight."""

    handoff_id: str
    epoch: int
    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAcknowledged:
    handoff_id: str
    epoch: int
    source: str


@dataclass(frozen=True, slots=True)
class OwnerAborted:
    handoff_id: str


@dataclass(frozen=True, slots=True)
class SourceLost:
    """Proven dead, not only silent."""

    source: str


DestinationEvent = (
    Reserve
    | WriteArrived
    | FirstTokenArrived
    | SourceReassured
    | SourceFailed
    | CancelAcknowledged
    | OwnerAborted
    | SourceLost
)


# ── actions ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Register:
    handoff_id: str
    epoch: int
    source: str


@dataclass(frozen=True, slots=True)
class Cancel:
    handoff_id: str
    epoch: int
    source: str


@dataclass(frozen=True, slots=True)
class Activate:
    """All KV is here."""

    handoff_id: str
    first_token: int | None = None
    """None unless it was wanted."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The owner should hear at once that no KV will come; the blocks stay where they are."""

    handoff_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Free:
    """Nobody can write to the blocks any more. Always after GiveUp or the owner's abort."""

    handoff_id: str


@dataclass(frozen=True, slots=True)
class Probe:
    """This source was silent for long: find out whether it is dead (`SourceLost` if so)."""

    source: str


DestinationAction = Register | Cancel | Activate | GiveUp | Free | Probe


# ── the machine ───────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Part:
    """What one source still owes."""

    heard_s: float
    sent_s: float
    owes_token: bool
    is_known: bool = False
    """The source has answered, so the registration arrived."""
    seen: set[int] = field(default_factory=set)
    total: int = 0

    @property
    def is_written(self) -> bool:
        return self.total > 0 and len(self.seen) == self.total

    @property
    def is_complete(self) -> bool:
        return self.is_written and not self.owes_token


@dataclass(slots=True)
class _Reservation:
    epoch: int
    expires_at_s: float
    parts: dict[str, _Part]
    """By source; those that may still write."""
    first_token: int | None = None
    state: ReservationState = ReservationState.RESERVED


class DestinationTable:
    """All reservations of one decode rank."""

    def __init__(self, *, silence_s: float, resend_s: float) -> None:
        """`silence_s`: a source that says nothing for so long is given up and probed. `resend_s`: how
        often a registration or a cancel that got no answer is said again."""
        self._silence_s = silence_s
        self._resend_s = resend_s
        self._reservations: dict[str, _Reservation] = {}
        self.num_dropped = 0
        """Late or repeated messages."""

    @property
    def is_idle(self) -> bool:
        return not self._reservations

    def state(self, handoff_id: str) -> ReservationState | None:
        reservation = self._reservations.get(handoff_id)
        return reservation.state if reservation else None

    def on_event(self, event: DestinationEvent, now_s: float) -> list[DestinationAction]:
        match event:
            case Reserve():
                return self._on_reserve(event, now_s)
            case WriteArrived():
                return self._on_write(event, now_s)
            case FirstTokenArrived():
                return self._on_token(event, now_s)
            case SourceReassured():
                if part := self._part(event.handoff_id, event.epoch, event.source):
                    part.heard_s, part.is_known = now_s, True
                return []
            case SourceFailed():
                if self._part(event.handoff_id, event.epoch, event.source) is None:
                    return []
                actions = self._give_up(event.handoff_id, event.reason, now_s)
                return actions + self._close(event.handoff_id, event.source)
            case CancelAcknowledged():
                if self._part(event.handoff_id, event.epoch, event.source) is None:
                    return []
                return self._close(event.handoff_id, event.source)
            case OwnerAborted():
                if event.handoff_id not in self._reservations:
                    return []
                return self._quarantine(event.handoff_id, now_s)
            case SourceLost():
                return self._on_lost(event.source, now_s)

    def on_time(self, now_s: float) -> list[DestinationAction]:
        """Deadlines and repetitions. Call a few times a second."""
        actions: list[DestinationAction] = []
        probes: set[str] = set()
        for handoff_id, reservation in list(self._reservations.items()):
            if reservation.state is not ReservationState.QUARANTINED:
                silent = [
                    s for s, part in reservation.parts.items() if now_s - part.heard_s >= self._silence_s
                ]
                if silent:
                    actions += self._give_up(handoff_id, f"{silent[0]} fell silent", now_s)
                elif now_s >= reservation.expires_at_s:
                    actions += self._give_up(handoff_id, "the reservation's lease ended", now_s)
            is_quarantined = reservation.state is ReservationState.QUARANTINED
            for source, part in reservation.parts.items():
                if is_quarantined and now_s - part.heard_s >= self._silence_s:
                    probes.add(source)
                if now_s - part.sent_s >= self._resend_s and (is_quarantined or not part.is_known):
                    part.sent_s = now_s
                    message = Cancel if is_quarantined else Register
                    actions.append(message(handoff_id, reservation.epoch, source))
        return actions + [Probe(source) for source in sorted(probes)]

    def _on_reserve(self, event: Reserve, now_s: float) -> list[DestinationAction]:
        if event.handoff_id in self._reservations:
            self.num_dropped += 1
            return []
        self._reservations[event.handoff_id] = _Reservation(
            epoch=event.epoch,
            expires_at_s=now_s + event.lease_s,
            parts={
                source: _Part(heard_s=now_s, sent_s=now_s, owes_token=event.wants_first_token)
                for source in event.sources
            },
        )
        return [Register(event.handoff_id, event.epoch, source) for source in event.sources]

    def _on_write(self, event: WriteArrived, now_s: float) -> list[DestinationAction]:
        part = self._part(event.handoff_id, event.epoch, event.source)
        if part is None:
            return []
        part.heard_s, part.is_known = now_s, True
        part.seen.add(event.seq)
        part.total = max(part.total, event.total)
        reservation = self._reservations[event.handoff_id]
        if part.is_complete or (reservation.state is ReservationState.QUARANTINED and part.is_written):
            return self._close(event.handoff_id, event.source)
        if reservation.state is ReservationState.RESERVED:
            reservation.state = moved(RESERVATION_MOVES, reservation.state, ReservationState.ARRIVING)
        return []

    def _on_token(self, event: FirstTokenArrived, now_s: float) -> list[DestinationAction]:
        part = self._part(event.handoff_id, event.epoch, event.source)
        if part is None:
            return []
        part.heard_s, part.is_known, part.owes_token = now_s, True, False
        self._reservations[event.handoff_id].first_token = event.token_id
        return self._close(event.handoff_id, event.source) if part.is_complete else []

    def _on_lost(self, source: str, now_s: float) -> list[DestinationAction]:
        actions: list[DestinationAction] = []
        for handoff_id, reservation in list(self._reservations.items()):
            if source in reservation.parts:
                actions += self._give_up(handoff_id, f"{source} is lost", now_s)
                actions += self._close(handoff_id, source)
        return actions

    def _give_up(self, handoff_id: str, reason: str, now_s: float) -> list[DestinationAction]:
        if self._reservations[handoff_id].state is ReservationState.QUARANTINED:
            return []
        return [GiveUp(handoff_id, reason), *self._quarantine(handoff_id, now_s)]

    def _quarantine(self, handoff_id: str, now_s: float) -> list[DestinationAction]:
        reservation = self._reservations[handoff_id]
        if reservation.state is ReservationState.QUARANTINED:
            return []
        reservation.state = moved(RESERVATION_MOVES, reservation.state, ReservationState.QUARANTINED)
        for part in reservation.parts.values():
            part.sent_s = now_s
        return [Cancel(handoff_id, reservation.epoch, source) for source in reservation.parts]

    def _close(self, handoff_id: str, source: str) -> list[DestinationAction]:
        """This source will write no more."""
        reservation = self._reservations[handoff_id]
        del reservation.parts[source]
        if reservation.parts:
            return []
        del self._reservations[handoff_id]
        if reservation.state is ReservationState.QUARANTINED:
            reservation.state = moved(RESERVATION_MOVES, reservation.state, ReservationState.RELEASED)
            return [Free(handoff_id)]
        reservation.state = moved(RESERVATION_MOVES, reservation.state, ReservationState.ACTIVATED)
        return [Activate(handoff_id, reservation.first_token)]

    def _part(self, handoff_id: str, epoch: int, source: str) -> _Part | None:
        reservation = self._reservations.get(handoff_id)
        if reservation is not None and reservation.epoch == epoch and source in reservation.parts:
            return reservation.parts[source]
        self.num_dropped += 1
        return None
