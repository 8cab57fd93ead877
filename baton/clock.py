"""Where time comes from. Decisions are handed `now_s`; only shells read a clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds; the zero point means nothing and differs between hosts."""

    def now_s(self) -> float: ...


class SystemClock:
    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """Stands still until told: for tests and virtual time."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0
        self._now_s += seconds
