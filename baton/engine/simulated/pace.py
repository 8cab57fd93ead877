"""A simulated worker stepped in real time, by one timer.

A step begins where the one before it was planned to end, not when a late timer noticed, so delays of
the event loop do not add up. Behind by more than `MAX_LAG_S` (this machine has too little CPU, or
stood still) the rest is given up: a device would not catch up either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from baton.clock import Clock
from baton.simulation import SimulatedWorker, StepResult

logger = logging.getLogger(__name__)

MAX_LAG_S = 0.1


class Pace:
    def __init__(
        self,
        worker: SimulatedWorker,
        clock: Clock,
        on_result: Callable[[StepResult], None],
        on_fetch: Callable[[str], None],
        on_broken: Callable[[str], None],
    ) -> None:
        """on_fetch(leg_id): a leg has blocks for KV that comes from elsewhere. on_broken(reason): a step
        failed; nothing is stepped any more."""
        self._worker = worker
        self._clock = clock
        self._on_result = on_result
        self._on_fetch = on_fetch
        self._on_broken = on_broken
        self._timer: asyncio.Handle | None = None
        self._is_turn_due = False
        self._is_over = False
        self._is_lag_told = False

    def wake(self) -> None:
        """Something may be there to compute now. A step in progress ends first."""
        if self._is_turn_due or self._is_over or self._worker.plan is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._is_turn_due = True
        self._timer = asyncio.get_running_loop().call_soon(self._on_timer)

    def stop(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()

    def _on_timer(self) -> None:
        # Whoever wakes us from here on is heard anyway, in the step about to be planned.
        self._is_turn_due = True
        try:
            self._turn()
        except Exception as error:
            logger.exception("simulated engine step failed")
            self.stop()
            self._on_broken(f"{type(error).__name__}: {error}")

    def _turn(self) -> None:
        worker = self._worker
        start_s = self._clock.now_s()
        if worker.plan is not None:
            result = worker.end_step()
            if worker.load().num_running:
                start_s = self._next_start_s(result.end_s, start_s)
            self._on_result(result)
            if self._is_over:
                return
        plan = worker.begin_step(start_s)
        self._is_turn_due = False
        for fetch in worker.places.take_fetches():
            self._on_fetch(fetch.leg_id)
        if plan is not None:
            self._arm(plan.end_s)

    def _next_start_s(self, end_s: float, now_s: float) -> float:
        lag_s = now_s - end_s
        if lag_s <= MAX_LAG_S:
            return end_s
        if not self._is_lag_told:
            self._is_lag_told = True
            logger.warning(
                "simulated engine %.3f s behind its pace, goes on from here: too little CPU", lag_s
            )
        return now_s

    def _arm(self, end_s: float) -> None:
        loop, delay_s = asyncio.get_running_loop(), end_s - self._clock.now_s()
        if delay_s <= 0:
            self._timer = loop.call_soon(self._on_timer)
        else:
            self._timer = loop.call_later(delay_s, self._on_timer)
