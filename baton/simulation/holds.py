"""KV of finished prefills, kept for its readers until it is read or its lease ends."""

from __future__ import annotations

from collections.abc import Iterator

from baton.simulation.kv_cache import PrefixCache, Run
from baton.simulation.legs import HeldKv, Leg


class Holds:
    """All leases are equally long, so the oldest ends first."""

    def __init__(self, cache: PrefixCache, lease_s: float) -> None:
        self._cache = cache
        self._lease_s = lease_s
        self._holds: dict[str, tuple[HeldKv, list[Run], int]] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def __iter__(self) -> Iterator[tuple[HeldKv, list[Run], int]]:
        """Each with its blocks: runs, and how many more no hash names."""
        return iter(self._holds.values())

    def keep(self, leg: Leg, now_s: float) -> HeldKv:
        """Takes the leg's blocks over."""
        held = HeldKv(leg.leg_id, leg.num_blocks, now_s + self._lease_s)
        self._holds[leg.leg_id] = (held, leg.runs, leg.num_own_blocks)
        leg.runs, leg.num_own_blocks = [], 0
        return held

    def release(self, leg_id: str) -> bool:
        """False: it is not held, or not any more."""
        hold = self._holds.pop(leg_id, None)
        if hold is None:
            return False
        self._cache.leave(hold[1], hold[2])
        return True

    def expire(self, now_s: float) -> None:
        while (end_s := self.next_end_s) is not None and end_s <= now_s:
            self.release(next(iter(self._holds)))

    @property
    def next_end_s(self) -> float | None:
        for hold, _, _ in self._holds.values():
            return hold.end_s
        return None
