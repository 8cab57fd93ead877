"""How fast requests leave, so that a refused client hears an honest time to come back."""

from __future__ import annotations

from collections import deque

MAX_RETRY_AFTER_S = 30.0
_WINDOW = 256


class DrainRate:
    """Rate over the last finished requests; forgets what is older than the window."""

    def __init__(self) -> None:
        self._finished_s: deque[float] = deque(maxlen=_WINDOW)

    def count(self, now_s: float) -> None:
        self._finished_s.append(now_s)

    def seconds_for(self, num_queued: int, now_s: float) -> float:
        """Expected seconds until `num_queued` requests have left: 1 to MAX_RETRY_AFTER_S, and the
        maximum while nothing has left yet."""
        if len(self._finished_s) < 2:
            return MAX_RETRY_AFTER_S
        span_s = max(now_s - self._finished_s[0], 1e-3)
        rate_per_s = len(self._finished_s) / span_s
        return min(MAX_RETRY_AFTER_S, max(1.0, num_queued / rate_per_s))
