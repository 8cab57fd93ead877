"""Least request: the worker with the fewest legs.

Optimises balance of counts. Reads legs. Does badly when requests differ in size, and where caches
matter: it scatters every session over the fleet.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless


class LeastRequest(Memoryless):
    name = "least-request"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return (candidates.num_legs,)
