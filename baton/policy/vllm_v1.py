"""vLLM-v1's data-parallel balancer: 4 x waiting + running, smallest first.

Optimises queueing, by counting requests; the weight says that a waiting request hurts more than a
running one. The LMetric paper's code writes `4*waiting + bs` where bs already holds the waiting
ones, which is 5 x waiting + running (`vllm:5` here).

Reads legs and those of them whose prompt is not computed yet. Does badly on prompts of different
lengths and on everything with shared prefixes: it sees neither tokens nor caches.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless


class VllmV1(Memoryless):
    def __init__(self, waiting_weight: int = 4) -> None:
        self._weight = waiting_weight
        self.name = "vllm" if waiting_weight == 4 else f"vllm:{waiting_weight}"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return (self._weight * candidates.num_waiting + candidates.num_running,)
