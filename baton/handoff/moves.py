"""The states of a hand-off on both sides, and the legal moves as tables."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar


class HoldState(Enum):
    """A prompt's blocks on the prefill worker."""

    FILLING = "filling"
    """Prefill runs: the engine owns the blocks, finished ones may be written."""
    HELD = "held"
    """Prefill is over: kept for destinations until the lease ends."""
    RELEASING = "releasing"
    """Nothing more is written; what is in flight still reads the blocks."""
    RELEASED = "released"


class StreamState(Enum):
    """One source rank writing to one destination rank."""

    WRITING = "writing"
    DRAINING = "draining"
    """No write is started any more; those in flight must end before anybody is told."""
    ENDED = "ended"


class ReservationState(Enum):
    """A prompt's blocks on the decode worker."""

    RESERVED = "reserved"
    ARRIVING = "arriving"
    ACTIVATED = "activated"
    """All KV is here; the blocks are the engine's."""
    QUARANTINED = "quarantined"
    """Given up here, but a source may still write: neither used nor freed."""
    RELEASED = "released"


State = TypeVar("State", HoldState, StreamState, ReservationState)

HOLD_MOVES: Mapping[HoldState, frozenset[HoldState]] = {
    HoldState.FILLING: frozenset({HoldState.HELD, HoldState.RELEASING}),
    HoldState.HELD: frozenset({HoldState.RELEASING}),
    HoldState.RELEASING: frozenset({HoldState.RELEASED}),
    HoldState.RELEASED: frozenset(),
}

STREAM_MOVES: Mapping[StreamState, frozenset[StreamState]] = {
    StreamState.WRITING: frozenset({StreamState.DRAINING, StreamState.ENDED}),
    StreamState.DRAINING: frozenset({StreamState.ENDED}),
    StreamState.ENDED: frozenset(),
}

RESERVATION_MOVES: Mapping[ReservationState, frozenset[ReservationState]] = {
    ReservationState.RESERVED: frozenset(
        {ReservationState.ARRIVING, ReservationState.ACTIVATED, ReservationState.QUARANTINED}
    ),
    ReservationState.ARRIVING: frozenset({ReservationState.ACTIVATED, ReservationState.QUARANTINED}),
    ReservationState.QUARANTINED: frozenset({ReservationState.RELEASED}),
    ReservationState.ACTIVATED: frozenset(),
    ReservationState.RELEASED: frozenset(),
}


class IllegalMove(Exception):
    """A mistake in this program, never a peer's: messages cannot cause it."""


def moved(moves: Mapping[State, frozenset[State]], old: State, new: State) -> State:
    """`new`. Raises IllegalMove, changing nothing."""
    if new not in moves[old]:
        raise IllegalMove(f"{type(old).__name__}: {old.value} to {new.value}")
    return new
