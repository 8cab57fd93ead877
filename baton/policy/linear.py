"""Linear: lambda x (1 - hit ratio) + (1 - lambda) x batch / largest batch.

The hand-tuned production rule the LMetric paper calls BAILIAN (there 0.7 for chat, 0.55 for API
traffic; its argmin form, its code also samples). Optimises whatever lambda was tuned for.

Reads hits and legs. Does badly away from the trace lambda was tuned on, and where prompts differ
much in length: a hit *ratio* does not know how many tokens it saves. Without the division by the
largest batch the choice would depend on the unit of each term.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless


class Linear(Memoryless):
    def __init__(self, hit_weight: float = 0.7) -> None:
        if not 0 <= hit_weight <= 1:
            raise ValueError(f"linear's lambda is {hit_weight}, expected 0 to 1")
        self._weight = hit_weight
        self.name = f"linear:{hit_weight:g}"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        miss = 1 - candidates.hit_tokens / candidates.facts.num_prompt_tokens
        batch = candidates.batch
        return (self._weight * miss + (1 - self._weight) * (batch / batch.max()), batch)
