"""How fast the line of waiting requests gets shorter, measured while there is one.

Only a line tells how fast it moves: a fleet with nothing to do is not slow. So what is measured is
the time between departures to workers while somebody is waiting, idle hours count for nothing, and
the wait since the latest departure counts as soon as it began: a fleet that got stuck looks slow
before anybody leaves again.
"""

from __future__ import annotations

from collections import deque

MEMORY_S = 10.0
"""Of time spent with a line. What departed earlier is forgotten, but for the last MIN_REMEMBERED."""
MIN_REMEMBERED, MAX_REMEMBERED = 32, 4096


class DrainRate:
    def __init__(self) -> None:
        self._gaps_s: deque[float] = deque()
        self._sum_s = 0.0
        self._since_s: float | None = None
        """The latest departure, or when the line began; None: nobody waits."""

    def waits(self, is_line: bool, now_s: float) -> None:
        """Whether somebody is left waiting after everything that could leave has left."""
        if not is_line:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s

    def departed(self, now_s: float) -> None:
        """One request went to its workers. Counts only if it had stood in a line."""
        if self._since_s is None:
            return
        gap_s = now_s - self._since_s
        self._since_s = now_s
        self._gaps_s.append(gap_s)
        self._sum_s += gap_s
        while len(self._gaps_s) > MAX_REMEMBERED or (
            len(self._gaps_s) > MIN_REMEMBERED and self._sum_s - self._gaps_s[0] >= MEMORY_S
        ):
            self._sum_s -= self._gaps_s.popleft()

    def seconds_for(self, num_requests: int, now_s: float) -> float | None:
        """Until so many have departed; None: no departure from a line has been seen yet."""
        if not self._gaps_s:
            return None
        open_s = 0.0 if self._since_s is None else now_s - self._since_s
        mean_s = self._sum_s / len(self._gaps_s)
        # A wait longer than usual is news; a shorter one only means that the next is not due yet.
        if open_s > mean_s:
            mean_s = (self._sum_s + open_s) / (len(self._gaps_s) + 1)
        return num_requests * mean_s
