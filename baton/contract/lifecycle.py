"""The life of one request as the coordinator sees it.

    QUEUED ──> PREFILLING ──> HANDING_OFF ──> DECODING ──> FINISHED
      │            │               │              │            ^
      └────────────┴───────────────┴──────────────┴────────────┘   (abort, error, or done early)

A failed attempt goes back to QUEUED from any of the three states in the middle, and the next one has a
new `handoff_id`; messages of the old attempt are recognised by it and dropped. FINISHED is left by nobody.
"""

from __future__ import annotations

from enum import Enum


class WorkerRole(str, Enum):
    """Which phases a worker serves. The first two also name the phases themselves."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def phases(self) -> tuple[WorkerRole, ...]:
        return PHASES if self is WorkerRole.BOTH else (self,)


PHASES = (WorkerRole.PREFILL, WorkerRole.DECODE)


class Way(str, Enum):
    """How one attempt was served; also the metric label."""

    DISAGGREGATED = "disaggregated"
    """Prefill on one worker, its KV read by another."""
    COLOCATED = "colocated"
    """Both phases fell to one worker."""
    STAYED = "stayed"
    """The decode worker computed what it did not hold of the prompt, see `baton.policy.stay_or_go`."""
    PREFILL_ONLY = "prefill only"
    """The first token was the whole answer."""
    RECOMPUTED = "recomputed"
    """The prompt had been computed, its KV was lost, and the decode worker computed it again."""


class Transfer(str, Enum):
    """How the KV of a disaggregated attempt gets to its decode worker; also the metric label."""

    STREAM = "stream"
    """Written by the prefill worker while it computes."""
    PULL = "pull"
    """Read by the decode worker when the prefill is over."""


class RequestState(Enum):
    QUEUED = "queued"
    """Accepted; waits for a prefill worker and room on a decode worker."""
    PREFILLING = "prefilling"
    """A prefill worker computes the prompt's KV while blocks are reserved on the decode worker; or the
    decode worker computes it itself."""
    HANDING_OFF = "handing_off"
    """The decode worker has been told to fetch the KV; no token of it has arrived yet."""
    DECODING = "decoding"
    """The decode worker has produced at least one token."""
    FINISHED = "finished"
    """The client has heard the outcome."""


LEGAL_MOVES: dict[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: frozenset(
        # Straight to HANDING_OFF: the prompt was computed, its KV got lost, decode recomputes it.
        {RequestState.PREFILLING, RequestState.HANDING_OFF, RequestState.FINISHED}
    ),
    RequestState.PREFILLING: frozenset(
        # Straight to DECODING: the prompt was computed where it is decoded.
        {RequestState.HANDING_OFF, RequestState.DECODING, RequestState.QUEUED, RequestState.FINISHED}
    ),
    RequestState.HANDING_OFF: frozenset({RequestState.DECODING, RequestState.QUEUED, RequestState.FINISHED}),
    # Back to QUEUED: the decode worker is lost, the answer goes on from the tokens the client has.
    RequestState.DECODING: frozenset({RequestState.QUEUED, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}


class Outcome(str, Enum):
    """How a request ended; also the metric label. Every accepted request gets exactly one."""

    COMPLETED = "completed"
    ABORTED = "aborted"
    EXPIRED = "expired"
    FAILED = "failed"


class IllegalMove(Exception):
    """The code tried a state change that LEGAL_MOVES does not list: a bug of ours, never input."""


def check_move(old: RequestState, new: RequestState) -> None:
    if new not in LEGAL_MOVES[old]:
        raise IllegalMove(f"{old.value} -> {new.value}")
