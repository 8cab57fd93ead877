"""Names under which readers ask for finished prompts.

Hold ids carry a random part, so that a restarted source on the same port never answers for its
predecessor. Blocks and leases are the worker's (`baton.simulation`); a name outlives its lease by a
while, the worker says what it is worth.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hold:
    handoff_id: str
    kv: int
    end_s: float


class HoldIds:
    """All leases are equally long, so the oldest ends first."""

    def __init__(self) -> None:
        self._holds: dict[str, Hold] = {}
        self._id_by_handoff: dict[str, str] = {}
        self._boot = secrets.token_hex(4)
        self._num_made = 0

    def __len__(self) -> int:
        return len(self._holds)

    def add(self, handoff_id: str, kv: int, end_s: float, now_s: float) -> str:
        """Returns the new id; forgets those whose leases have ended."""
        while self._holds:
            oldest = next(iter(self._holds))
            if self._holds[oldest].end_s > now_s:
                break
            self.take(oldest)
        self._num_made += 1
        hold_id = f"{self._boot}-{self._num_made}"
        self._holds[hold_id] = Hold(handoff_id, kv, end_s)
        self._id_by_handoff[handoff_id] = hold_id
        return hold_id

    def take(self, hold_id: str) -> Hold | None:
        hold = self._holds.pop(hold_id, None)
        if hold is not None:
            self._id_by_handoff.pop(hold.handoff_id, None)
        return hold

    def forget(self, handoff_id: str) -> bool:
        """False: it is not held."""
        hold_id = self._id_by_handoff.get(handoff_id)
        return hold_id is not None and self.take(hold_id) is not None
