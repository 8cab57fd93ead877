"""Decode: the smallest batch among workers with room; fewer KV tokens decide ties, then
the worker that was chosen longest ago.

A decode step slows with every sequence in it, so the smallest batch gives the best time per token.
Room is checked before (`room`): a worker without it would preempt somebody. Reads legs, KV
tokens and turns. Blind to context length until a tie: a few long contexts can be slower than many short
ones; `fewest-kv-tokens` is for such traffic.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless
from baton.policy.ledger import WorkerAccount


class SmallestBatch(Memoryless):
    name = "smallest-batch"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return candidates.num_legs, candidates.num_kv_tokens, candidates.last_turn

    def rank_one(self, account: WorkerAccount, num_uncached_tokens: int) -> tuple[int, ...]:
        return account.num_legs, account.num_kv_tokens, account.last_turn
