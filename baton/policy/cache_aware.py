"""Cache-aware (SGLang's gateway): shortest queue if uneven, else the best match above a threshold.

If max - min > 32 requests and max > 1.1 x min: fewest requests. Otherwise, if the best match covers
more than half of the prompt: that worker. Otherwise: fewest requests (SGLang's comment says
"smallest tree"; its versions differ).

Reads hits and legs. SGLang matches characters in a tree of what it routed; here it gets the exact
hits, which flatters it. Does badly with many medium matches (all below half: no affinity at all),
and never weighs how long the matching worker's queue is.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless


class CacheAware(Memoryless):
    def __init__(
        self, min_match: float = 0.5, min_imbalance: int = 32, min_imbalance_ratio: float = 1.1
    ) -> None:
        self._min_match = min_match
        self._min_imbalance = min_imbalance
        self._min_ratio = min_imbalance_ratio
        self.name = "cache-aware" if min_match == 0.5 else f"cache-aware:{min_match:g}"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        legs, hits = candidates.num_legs, candidates.hit_tokens
        most, fewest = int(legs.max()), int(legs.min())
        if most - fewest > self._min_imbalance and most > self._min_ratio * fewest:
            return (legs,)
        if int(hits.max()) > self._min_match * candidates.facts.num_prompt_tokens:
            return -hits, legs
        return (legs,)
