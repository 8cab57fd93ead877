"""P-token alone: the worker with the fewest uncached tokens to compute, this prompt's included.

What the LMetric paper advises for pure prefill pools (section 7), and "least-wait-token" in its
code. Optimises time to first token: on a first come, first served worker the score is its queue.

Reads hits, queued tokens, legs and turns (ties). Does badly on colocated workers: it has no term for decode,
and piles running requests onto the owner of a popular prefix.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless
from baton.policy.ledger import WorkerAccount


class PToken(Memoryless):
    name = "p-token"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return candidates.p_tokens, candidates.num_legs, candidates.last_turn

    def rank_one(self, account: WorkerAccount, num_uncached_tokens: int) -> tuple[int, ...]:
        return account.num_queued_tokens + num_uncached_tokens, account.num_legs, account.last_turn
