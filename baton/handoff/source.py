"""The prefill worker's half: which finished blocks to write where, and when held blocks may be freed.

A *hold* is a prompt's blocks, from the first computed one until they are released. A *stream* is one
conversation with one destination rank, known by `StreamKey`; its cursor per layer says how far it has
written. The cursor starts at what the destination already has, not at the chunk at hand, so prefix hits
here and a destination that registers late need no code of their own: what is behind is written next.

Two promises, on which the destination frees its memory:

* `Fail` and `AcknowledgeCancel` are given only when nothing of that stream is in flight, and nothing of
  that key is ever written again: ended keys are remembered, so a late registration starts nothing.
* `Release` is given only when no write in flight reads the blocks.

Writes are numbered from 0. The number of all writes rides on the last one only; a notice covers its own
write alone, so the destination counts.

A destination may want the prompt's first token along with the KV. It is sampled after the last block is
ready, so it travels by itself, and a stream that owes it is not over when its last write is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.handoff.moves import HOLD_MOVES, STREAM_MOVES, HoldState, StreamState, moved

REMEMBER_ENDED_S = 600.0
"""How long an ended key is known. Messages between two live processes are not delayed by minutes."""


class StreamKey(NamedTuple):
    handoff_id: str
    destination: str
    """A rank of one boot of a decode worker."""
    epoch: int
    """Counts up per reservation on the destination: another promise of blocks, another epoch."""


# ── facts ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksComputed:
    """The first one opens the hold."""

    handoff_id: str
    block_ids: Sequence[int]
    """Of the prompt so far, in its order."""
    num_ready: int
    """How many of them are complete. The last one of the prompt counts when the prompt is computed."""
    num_total: int
    """Blocks of the whole prompt."""
    layer: int | None = None
    """None: all layers are that far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPreempted:
    """The blocks are gone; others will be computed. Wait for `num_in_flight` to be 0 before reuse."""

    handoff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillEnded:
    handoff_id: str
    lease_s: float | None
    """None: aborted, or the answer is over; nobody wants the KV."""
    first_token: int | None = None
    """What the prompt's last position gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseWanted:
    """The hold's owner lets go before the lease ends."""

    handoff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationRegistered:
    key: StreamKey
    num_destinations: int
    """Ranks that this source rank serves for the hand-off."""
    block_ids: Sequence[int]
    """Where to write the blocks after the skipped ones."""
    num_skipped: int
    """Leading blocks that the destination has already."""
    ttl_s: float
    """How long to wait for the prefill to show up."""
    wants_first_token: bool = False


@dataclass(frozen=True, slots=True)
class CancelReceived:
    key: StreamKey


@dataclass(frozen=True, slots=True)
class WriteEnded:
    key: StreamKey
    seq: int
    is_good: bool


@dataclass(frozen=True, slots=True)
class DestinationLost:
    """Proven dead: its memory is gone."""

    destination: str


SourceEvent = (
    BlocksComputed
    | PrefillPreempted
    | PrefillEnded
    | ReleaseWanted
    | DestinationRegistered
    | CancelReceived
    | WriteEnded
    | DestinationLost
)


# ── actions ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    key: StreamKey
    seq: int
    total: int
    """Number of all writes of the stream on the last one, else 0."""
    layers: range
    source_blocks: Sequence[int]
    destination_blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class GiveFirstToken:
    """Once per stream that wants it."""

    key: StreamKey
    token_id: int


@dataclass(frozen=True, slots=True)
class AcknowledgeCancel:
    key: StreamKey


@dataclass(frozen=True, slots=True)
class Fail:
    key: StreamKey
    reason: str


@dataclass(frozen=True, slots=True)
class Reassure:
    """Tell the destination that its registration is known and this process lives."""

    key: StreamKey


@dataclass(frozen=True, slots=True)
class Release:
    handoff_id: str


SourceAction = Write | GiveFirstToken | AcknowledgeCancel | Fail | Reassure | Release


# ── the machine ───────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Hold:
    num_layers: int
    num_total: int
    block_ids: Sequence[int] = ()
    ready: list[int] = field(default_factory=list)
    """Per layer."""
    state: HoldState = HoldState.FILLING
    lease_s: float = 0.0
    expires_at_s: float | None = None
    first_token: int | None = None
    served: set[str] = field(default_factory=set)
    """Destinations."""
    is_served: bool = False
    """All that there are: some may register only after others are served."""


@dataclass(slots=True, eq=False)
class _Stream:
    key: StreamKey
    num_destinations: int
    destination_blocks: Sequence[int]
    num_skipped: int
    expires_at_s: float
    """Only counts while there is no hold."""
    written: list[int]
    """Per layer, in blocks of the prompt."""
    reassured_s: float
    owes_token: bool = False
    state: StreamState = StreamState.WRITING
    num_posted: int = 0
    is_all_posted: bool = False
    in_flight: dict[int, int] = field(default_factory=dict)
    """seq → bytes."""
    reason: str = ""
    is_cancelled: bool = False
    is_lost: bool = False


class SourceTable:
    """All holds and streams of one prefill rank."""

    def __init__(
        self,
        *,
        num_layers: int,
        bytes_per_block_layer: int,
        max_outstanding_bytes: int,
        reassure_every_s: float,
    ) -> None:
        """`max_outstanding_bytes` bounds what is in flight to one destination rank: what exceeds it
        waits behind the cursor and goes out in larger pieces later. The model never waits."""
        self._num_layers = num_layers
        self._block_layer_bytes = bytes_per_block_layer
        self._max_outstanding_bytes = max_outstanding_bytes
        self._reassure_every_s = reassure_every_s
        self._holds: dict[str, _Hold] = {}
        self._streams: dict[StreamKey, _Stream] = {}
        self._by_handoff: dict[str, list[_Stream]] = {}
        """The same, most of them alone."""
        self._ended: OrderedDict[StreamKey, tuple[float, bool]] = OrderedDict()
        """Key → (when, whether all was written)."""
        self._released: OrderedDict[str, float] = OrderedDict()
        """Hand-offs whose blocks are gone → when."""
        self.num_dropped = 0
        """Late or repeated messages."""

    @property
    def is_idle(self) -> bool:
        return not self._holds and not self._streams

    def num_in_flight(self, handoff_id: str) -> int:
        return sum(len(stream.in_flight) for stream in self._streams_of(handoff_id))

    def knows(self, key: StreamKey) -> bool:
        """It has registered, whatever came of it."""
        return key in self._streams or key in self._ended

    def held_bytes(self) -> int:
        """Of prompts that are computed and wait for their destination."""
        held = sum(hold.num_total for hold in self._holds.values() if hold.state is HoldState.HELD)
        return held * self._num_layers * self._block_layer_bytes

    def on_event(self, event: SourceEvent, now_s: float) -> list[SourceAction]:
        match event:
            case BlocksComputed():
                return self._on_computed(event, now_s)
            case PrefillPreempted():
                if hold := self._holds.get(event.handoff_id):
                    hold.block_ids, hold.ready = (), [0] * self._num_layers
                return []
            case PrefillEnded():
                return self._on_prefill_ended(event, now_s)
            case ReleaseWanted():
                return self._give_up_hold(event.handoff_id, "the source let go of its blocks", now_s)
            case DestinationRegistered():
                return self._on_registered(event, now_s)
            case CancelReceived():
                return self._on_cancel(event.key, now_s)
            case WriteEnded():
                return self._on_write_ended(event, now_s)
            case DestinationLost():
                return self._on_lost(event.destination, now_s)

    def on_time(self, now_s: float) -> list[SourceAction]:
        """Leases, registrations without a prefill, signs of life. Call a few times a second."""
        actions: list[SourceAction] = []
        for handoff_id, hold in list(self._holds.items()):
            if hold.expires_at_s is not None and now_s >= hold.expires_at_s:
                actions += self._give_up_hold(handoff_id, "the source's lease ended", now_s)
        for key, stream in list(self._streams.items()):
            if key.handoff_id not in self._holds and now_s >= stream.expires_at_s:
                actions += self._drain(stream, "no prefill came for this registration", now_s)
            elif now_s - stream.reassured_s >= self._reassure_every_s and not stream.is_lost:
                stream.reassured_s = now_s
                actions.append(Reassure(key))
        self._forget(now_s)
        return actions

    def _forget(self, now_s: float) -> None:
        while self._ended and now_s - next(iter(self._ended.values()))[0] >= REMEMBER_ENDED_S:
            self._ended.popitem(last=False)
        while self._released and now_s - next(iter(self._released.values())) >= REMEMBER_ENDED_S:
            self._released.popitem(last=False)

    # ── prefill ───────────────────────────────────────────────────────────────────────────────

    def _on_computed(self, event: BlocksComputed, now_s: float) -> list[SourceAction]:
        hold = self._holds.get(event.handoff_id)
        if hold is None:
            hold = self._holds[event.handoff_id] = _Hold(
                num_layers=self._num_layers, num_total=event.num_total, ready=[0] * self._num_layers
            )
        if hold.state is not HoldState.FILLING:
            self.num_dropped += 1
            return []
        hold.block_ids = event.block_ids
        for layer in range(self._num_layers) if event.layer is None else (event.layer,):
            hold.ready[layer] = max(hold.ready[layer], event.num_ready)
        return [
            action for stream in self._streams_of(event.handoff_id) for action in self._advance(stream, now_s)
        ]

    def _on_prefill_ended(self, event: PrefillEnded, now_s: float) -> list[SourceAction]:
        hold = self._holds.get(event.handoff_id)
        if hold is None or hold.state is not HoldState.FILLING:
            self.num_dropped += 1
            return []
        if event.lease_s is None:
            return self._give_up_hold(event.handoff_id, "the prefill was aborted", now_s)
        hold.state = moved(HOLD_MOVES, hold.state, HoldState.HELD)
        hold.lease_s, hold.expires_at_s = event.lease_s, now_s + event.lease_s
        hold.first_token = event.first_token
        actions: list[SourceAction] = []
        for stream in self._streams_of(event.handoff_id):
            actions += self._advance(stream, now_s)
        return actions + self._release_if_served(event.handoff_id, now_s)

    def _give_up_hold(self, handoff_id: str, reason: str, now_s: float) -> list[SourceAction]:
        hold = self._holds.get(handoff_id)
        if hold is None:
            self.num_dropped += 1
            return []
        if hold.state in (HoldState.FILLING, HoldState.HELD):
            hold.state = moved(HOLD_MOVES, hold.state, HoldState.RELEASING)
            hold.expires_at_s = None
        actions: list[SourceAction] = []
        for stream in self._streams_of(handoff_id):
            if not stream.is_all_posted or stream.owes_token:  # the rest of a complete one needs only to land
                actions += self._drain(stream, reason, now_s)
        return actions + self._release_if_quiet(handoff_id, now_s)

    def _release_if_served(self, handoff_id: str, now_s: float) -> list[SourceAction]:
        hold = self._holds.get(handoff_id)
        if hold is None:
            return []
        if hold.state is HoldState.HELD and hold.is_served:
            return self._give_up_hold(handoff_id, "served", now_s)
        return self._release_if_quiet(handoff_id, now_s)

    def _release_if_quiet(self, handoff_id: str, now_s: float) -> list[SourceAction]:
        hold = self._holds.get(handoff_id)
        if hold is None or hold.state is not HoldState.RELEASING or self.num_in_flight(handoff_id):
            return []
        hold.state = moved(HOLD_MOVES, hold.state, HoldState.RELEASED)
        del self._holds[handoff_id]
        self._released[handoff_id] = now_s
        return [Release(handoff_id)]

    # ── destinations ──────────────────────────────────────────────────────────────────────────

    def _on_registered(self, event: DestinationRegistered, now_s: float) -> list[SourceAction]:
        key = event.key
        if key in self._streams:
            return [Reassure(key)]  # asked again because our word was lost
        if key in self._ended:
            self.num_dropped += 1
            _, is_complete = self._ended[key]
            return [] if is_complete else [Fail(key, "this hand-off is over at the source")]
        if key.handoff_id in self._released:
            self._remember(key, now_s, is_complete=False)
            return [Fail(key, "the source has released these blocks")]
        stream = self._streams[key] = _Stream(
            key=key,
            num_destinations=event.num_destinations,
            destination_blocks=event.block_ids,
            num_skipped=event.num_skipped,
            expires_at_s=now_s + event.ttl_s,
            written=[event.num_skipped] * self._num_layers,
            reassured_s=now_s,
            owes_token=event.wants_first_token,
        )
        self._by_handoff.setdefault(key.handoff_id, []).append(stream)
        actions: list[SourceAction] = [Reassure(key)]
        hold = self._holds.get(key.handoff_id)
        if hold is not None and hold.state is HoldState.RELEASING:
            return actions + self._drain(stream, "the source let go of its blocks", now_s)
        for other in self._streams_of(key.handoff_id):
            if other.key.destination == key.destination and other.key.epoch < key.epoch:
                actions += self._drain(other, "a later registration replaced this one", now_s)
        return actions + self._advance(stream, now_s)

    def _on_cancel(self, key: StreamKey, now_s: float) -> list[SourceAction]:
        stream = self._streams.get(key)
        if stream is None:
            self._remember(key, now_s, is_complete=False)
            return [AcknowledgeCancel(key)]
        stream.is_cancelled = True
        return self._drain(stream, "cancelled", now_s)

    def _on_lost(self, destination: str, now_s: float) -> list[SourceAction]:
        actions: list[SourceAction] = []
        for stream in list(self._streams.values()):
            if stream.key.destination == destination:
                stream.is_lost = True
                actions += self._drain(stream, "the destination is lost", now_s)
        return actions

    # ── writing ───────────────────────────────────────────────────────────────────────────────

    def _advance(self, stream: _Stream, now_s: float) -> list[SourceAction]:
        return self._write(stream) + self._pay_token(stream, now_s) + self._end_if_complete(stream, now_s)

    def _write(self, stream: _Stream) -> list[SourceAction]:
        """All that is ready and not yet written, neighbouring layers at the same point together."""
        hold = self._holds.get(stream.key.handoff_id)
        if hold is None or stream.state is not StreamState.WRITING or hold.state is HoldState.RELEASING:
            return []
        stream.is_all_posted = all(written >= hold.num_total for written in stream.written)
        actions: list[SourceAction] = []
        layer = 0
        while layer < self._num_layers:
            first, start, end = layer, stream.written[layer], hold.ready[layer]
            while layer < self._num_layers and (stream.written[layer], hold.ready[layer]) == (start, end):
                layer += 1
            layers = range(first, layer)
            room = self._max_outstanding_bytes - sum(stream.in_flight.values())
            num_blocks = min(end - start, room // (self._block_layer_bytes * len(layers)))
            if num_blocks <= 0 and end > start and not stream.in_flight:
                num_blocks = 1  # a single block above the bound still has to move
            if num_blocks > 0:
                actions.append(self._post(stream, hold, layers, start, start + num_blocks))
        return actions

    def _pay_token(self, stream: _Stream, now_s: float) -> list[SourceAction]:
        hold = self._holds.get(stream.key.handoff_id)
        is_due = stream.owes_token and stream.state is StreamState.WRITING
        if hold is None or hold.state is not HoldState.HELD or not is_due:
            return []
        if hold.first_token is None:
            return self._drain(stream, "the prefill ended without a token", now_s)
        stream.owes_token = False
        return [GiveFirstToken(stream.key, hold.first_token)]

    def _post(self, stream: _Stream, hold: _Hold, layers: range, start: int, end: int) -> Write:
        for layer in layers:
            stream.written[layer] = end
        seq, stream.num_posted = stream.num_posted, stream.num_posted + 1
        stream.in_flight[seq] = (end - start) * len(layers) * self._block_layer_bytes
        stream.is_all_posted = all(written >= hold.num_total for written in stream.written)
        offset = stream.num_skipped
        return Write(
            key=stream.key,
            seq=seq,
            total=stream.num_posted if stream.is_all_posted else 0,
            layers=layers,
            source_blocks=hold.block_ids[start:end],
            destination_blocks=stream.destination_blocks[start - offset : end - offset],
        )

    def _on_write_ended(self, event: WriteEnded, now_s: float) -> list[SourceAction]:
        stream = self._streams.get(event.key)
        if stream is None or stream.in_flight.pop(event.seq, None) is None:
            self.num_dropped += 1
            return []
        if not event.is_good:
            stream.is_all_posted = False
            return self._drain(stream, "a write failed", now_s)
        hold = self._holds.get(event.key.handoff_id)
        if hold is not None and hold.expires_at_s is not None:
            hold.expires_at_s = max(hold.expires_at_s, now_s + hold.lease_s)
        if stream.state is StreamState.DRAINING:
            return self._end_if_drained(stream, now_s)
        return self._advance(stream, now_s)

    def _end_if_complete(self, stream: _Stream, now_s: float) -> list[SourceAction]:
        handoff_id = stream.key.handoff_id
        if stream.state is not StreamState.WRITING or not stream.is_all_posted:
            return []
        if stream.in_flight or stream.owes_token:
            return []
        self._end(stream, now_s, is_complete=True)
        hold = self._holds.get(handoff_id)
        if hold is None:
            return []
        hold.served.add(stream.key.destination)
        hold.is_served = len(hold.served) >= stream.num_destinations
        return self._release_if_served(handoff_id, now_s)

    def _drain(self, stream: _Stream, reason: str, now_s: float) -> list[SourceAction]:
        if stream.state is StreamState.WRITING:
            stream.state = moved(STREAM_MOVES, stream.state, StreamState.DRAINING)
            stream.reason = reason
        return self._end_if_drained(stream, now_s)

    def _end_if_drained(self, stream: _Stream, now_s: float) -> list[SourceAction]:
        if stream.in_flight or stream.state is not StreamState.DRAINING:
            return []
        self._end(stream, now_s, is_complete=False)
        actions: list[SourceAction] = []
        if stream.is_cancelled:
            actions.append(AcknowledgeCancel(stream.key))
        elif not stream.is_lost:
            actions.append(Fail(stream.key, stream.reason))
        return actions + self._release_if_quiet(stream.key.handoff_id, now_s)

    def _end(self, stream: _Stream, now_s: float, *, is_complete: bool) -> None:
        stream.state = moved(STREAM_MOVES, stream.state, StreamState.ENDED)
        del self._streams[stream.key]
        others = self._by_handoff[stream.key.handoff_id]
        others.remove(stream)
        if not others:
            del self._by_handoff[stream.key.handoff_id]
        self._remember(stream.key, now_s, is_complete=is_complete)

    def _remember(self, key: StreamKey, now_s: float, *, is_complete: bool) -> None:
        self._ended.pop(key, None)
        self._ended[key] = (now_s, is_complete)

    def _streams_of(self, handoff_id: str) -> list[_Stream]:
        return list(self._by_handoff.get(handoff_id, ()))
