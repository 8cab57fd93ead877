"""Round robin: the worker that was chosen longest ago.

With a fixed fleet this is the fixed cycle; a worker that joins gets its turn next, and nothing has
to be remembered outside the ledger. Reads the turn of each worker's last commit. Optimises
nothing; does badly with requests of different sizes and with any cache.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless


class RoundRobin(Memoryless):
    name = "round-robin"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return candidates.last_turn, candidates.slots
