"""How fast an engine that only waits for other processes steps.

While an engine holds blocks for a reader, or waits for KV itself, it has no model to run, and vLLM
steps it once a millisecond: a quarter of a core that on a small machine the busy engine beside it
would need. Steps are what drives the transfer, so the first ones come at vLLM's pace, which is when
a transfer usually happens; only an engine that has waited in vain for longer slows down. One that is
written to waits for as long as the whole prefill, and looks in its rests whether something has come.
"""

from __future__ import annotations

import time
from collections.abc import Callable

NUM_FAST_STEPS = 12
"""At 1 to 1.5 ms a step: an undisturbed hand-off is over within 10 ms."""

SLOW_STEP_S = 0.004
"""Added to vLLM's own millisecond. A reader that comes late waits this much longer, once or twice."""

LOOK_S = 0.001
"""As often as vLLM would step. A look takes 20 µs of CPU time, a step ten times that."""


class IdlePace:
    """Counts steps without work in a row."""

    def __init__(self) -> None:
        self._num_idle_steps = 0

    def sleep_s(self, *, has_work: bool) -> float:
        """Call once per step: how long to rest in this one."""
        if has_work:
            self._num_idle_steps = 0
            return 0.0
        self._num_idle_steps += 1
        return 0.0 if self._num_idle_steps <= NUM_FAST_STEPS else SLOW_STEP_S


def rest_until(
    has_come: Callable[[], bool], rest_s: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Rests so long, or until a look finds something."""
    num_looks = max(1, round(rest_s / LOOK_S))
    for _ in range(num_looks):
        if has_come():
            return
        sleep(rest_s / num_looks)
