"""Filter (AIBrix prefix-cache routing): balance first if the fleet is uneven, else most hits.

If the largest batch exceeds the smallest by more than `range`: fewest requests. Otherwise: most
hit tokens, then fewest requests. (LMetric paper, section 4; AIBrix's code has 8 for the range.)

Reads hits and legs. Optimises hits within a band of balance. Does badly at both edges of the band:
inside it a one-block hit beats an idle worker, outside it a full hit is thrown away.
"""

from __future__ import annotations

import numpy as np

from baton.policy.base import Candidates, Key, Memoryless


class AibrixFilter(Memoryless):
    def __init__(self, max_range: int = 8) -> None:
        self._max_range = max_range
        self.name = f"filter:{max_range}"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        legs = candidates.num_legs
        if np.ptp(legs) > self._max_range:
            return (legs,)
        return -candidates.hit_tokens, legs
