"""A recorded run as the rules read it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.contract.messages import RequestReport
from baton.history.records import Ask, FleetSnapshot, Kill, Limits

LOG_RESOLUTION_S = 0.001


@dataclass(frozen=True, slots=True)
class Finished:
    """A coordinator's final word on a request."""

    at_s: float
    """When it was logged: some time after it was decided, if many ended in the same moment."""
    whole_s: float
    """From submission to this word, on the coordinator's own clock."""
    handoff_id: str
    report: RequestReport


@dataclass(slots=True)
class CoordinatorRecord:
    """What one coordinator process said, by request id."""

    process: str
    ready_s: float | None = None
    stopped_s: float | None = None
    """None: it was killed, or still runs."""
    accepted: dict[str, list[float]] = field(default_factory=dict)
    attempts: dict[str, list[float]] = field(default_factory=dict)
    """When each attempt was sent to workers."""
    failed_attempts: dict[str, list[float]] = field(default_factory=dict)
    finished: dict[str, list[Finished]] = field(default_factory=dict)


@dataclass(slots=True)
class WorkerRecord:
    """What one worker process said."""

    process: str
    worker_id: str
    started_s: float
    stopped_s: float | None = None
    """None: it was killed, or still runs."""
    open_legs: dict[str, str] = field(default_factory=dict)
    """Request ids by hand-off id, of legs without an end; those abandoned with a lost coordinator are
    not among them."""
    leg_ends_s: list[float] = field(default_factory=list)
    """When its legs finished or failed, in order."""
    stray_ends: list[tuple[str, str]] = field(default_factory=list)
    """(request id, hand-off id) of ends of legs that were not open."""


@dataclass(slots=True)
class History:
    asks: Sequence[Ask] = ()
    coordinators: Sequence[CoordinatorRecord] = ()
    """In the order in which they started."""
    workers: Sequence[WorkerRecord] = ()
    kills: Sequence[Kill] = ()
    snapshots: Sequence[FleetSnapshot] = ()
    limits: Limits | None = None
    _finished: dict[str, Finished] | None = None

    def finished(self, request_id: str) -> Finished | None:
        """The first final word of any coordinator."""
        if self._finished is None:
            self._finished = {
                name: words[0]
                for coordinator in reversed(self.coordinators)
                for name, words in coordinator.finished.items()
            }
        return self._finished.get(request_id)

    def had_no_coordinator(self, start_s: float, end_s: float) -> bool:
        """At some time between the two the coordinator had been killed and its successor was not ready."""
        ready = [c.ready_s for c in self.coordinators if c.ready_s is not None]
        for kill in self.kills:
            if kill.name == "coordinator" and kill.at_s <= end_s:
                back_s = min((at_s for at_s in ready if at_s > kill.at_s), default=float("inf"))
                if start_s <= back_s + LOG_RESOLUTION_S:
                    return True
        return False

    def last_leg_end_s(self, worker_id: str, at_s: float) -> float:
        """When a leg of the process that had this id at `at_s` last ended before; when the process started,
        if none of it had, and -inf if nobody knows that process."""
        own = [w for w in self.workers if w.worker_id == worker_id and w.started_s <= at_s]
        if not own:
            return float("-inf")
        latest = max(own, key=lambda worker: worker.started_s)
        number = bisect_right(latest.leg_ends_s, at_s)
        return latest.leg_ends_s[number - 1] if number else latest.started_s
