"""Blocks that belong to no leg any more, and that a hand-off may still read or write.

Nothing here ends by itself. How long such blocks must stay is decided elsewhere: in the simulated engine by
`baton.handoff`, with its leases and quarantines, in virtual time by the replay, where a reader always comes.
"""

from __future__ import annotations

from collections.abc import Iterator

from baton.simulation.kv_cache import PrefixCache, Run
from baton.simulation.legs import Leg


class Holds:
    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._holds: dict[str, tuple[list[Run], int]] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def __iter__(self) -> Iterator[tuple[list[Run], int]]:
        """Runs, and how many more blocks no hash names."""
        return iter(self._holds.values())

    def keep(self, leg: Leg) -> None:
        """Takes the leg's blocks over."""
        assert leg.leg_id not in self._holds, f"blocks of {leg.leg_id} are held"
        self._holds[leg.leg_id] = (leg.runs, leg.num_own_blocks)
        leg.runs, leg.num_own_blocks = [], 0

    def release(self, leg_id: str) -> bool:
        """False: nothing of it is held."""
        hold = self._holds.pop(leg_id, None)
        if hold is None:
            return False
        self._cache.leave(*hold)
        return True
