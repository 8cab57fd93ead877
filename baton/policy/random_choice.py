"""Random: every worker alike.

Reads nothing but the draw. A baseline, and the honest choice of a router that knows nothing; with
random arrivals the longest queue grows like the logarithm of the fleet.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless


class RandomChoice(Memoryless):
    name = "random"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return ()
