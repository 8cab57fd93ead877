"""Are requests about equally long? Then first come, first served is the best order.

Watches what finished requests had received, and what running ones have: in a mix of many short and few
long ones the first to finish are all short, and only the unfinished tell of the others.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW = 256
MIN_FINISHED = 64
MAX_UNIFORM_CV = 0.5
OUTLIER_FACTOR = 2.0


class SizeSpread:
    def __init__(self) -> None:
        self._sizes: deque[float] = deque()
        self._sum = 0.0
        self._sum_of_squares = 0.0
        self._num_finished_until_trusted = 0

    def finished(self, size: float) -> None:
        self._sizes.append(size)
        self._sum += size
        self._sum_of_squares += size * size
        self._num_finished_until_trusted = max(0, self._num_finished_until_trusted - 1)
        if len(self._sizes) > WINDOW:
            oldest = self._sizes.popleft()
            self._sum -= oldest
            self._sum_of_squares -= oldest * oldest

    def saw(self, attained: float) -> None:
        """A request that is not finished has received so much."""
        if attained * len(self._sizes) > OUTLIER_FACTOR * self._sum:
            self._num_finished_until_trusted = WINDOW

    @property
    def is_uniform(self) -> bool:
        num = len(self._sizes)
        if num < MIN_FINISHED or self._num_finished_until_trusted:
            return False
        mean = self._sum / num
        variance = max(0.0, self._sum_of_squares / num - mean * mean)
        return math.sqrt(variance) < MAX_UNIFORM_CV * mean
