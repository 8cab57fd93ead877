"""A timer that runs while there is something to time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Ticker:
    def __init__(self, every_s: float, on_tick: Callable[[], bool]) -> None:
        """on_tick(): whether to go on."""
        self._every_s = every_s
        self._on_tick = on_tick
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def wake(self) -> None:
        if self._timer is None and not self._is_over:
            self._timer = asyncio.get_running_loop().call_later(self._every_s, self._fire)

    def stop(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        self._timer = None
        if self._on_tick():
            self.wake()
