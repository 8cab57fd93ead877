"""Power of two choices: two workers at random, the one with fewer legs.

Optimises balance with two look-ups, and does not herd when its facts are stale, which is what it
was made for; this coordinator's facts are not. Reads legs of two workers and the draw. Does badly
where caches matter: the owner of a prefix is rarely among the two.
"""

from __future__ import annotations

import numpy as np

from baton.policy.base import Candidates, Key, Memoryless


class PowerOfTwo(Memoryless):
    name = "power-of-two"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        num = len(candidates)
        # The low bits of the draw settle ties, so the two come from the high ones.
        pair = (candidates.draw >> 16) % (num * (num - 1))
        first, second = divmod(pair, num - 1)
        second += second >= first
        is_out = np.ones(num, dtype=np.bool_)
        is_out[[first, second]] = False
        return is_out, candidates.num_legs
