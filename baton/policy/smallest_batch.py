"""Decode: capacity first, then the smallest batch.

A decode step slows with every sequence in it, so the smallest batch gives the best time per token;
but a worker without KV room would preempt somebody, so room comes first. Blind to context length:
a few long contexts can be slower than many short ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.policy.base import RequestFacts, num_blocks_wanted
from baton.policy.ledger import WorkerAccount


class SmallestBatch:
    name = "smallest-batch"

    def choose(self, facts: RequestFacts, accounts: Sequence[WorkerAccount]) -> WorkerAccount | None:
        """Ties go to more free blocks, then to the worker id."""
        best: WorkerAccount | None = None
        best_key: tuple[int, int, str] | None = None
        for account in accounts:
            if account.num_legs >= account.capacity.max_batch_size:
                continue
            if num_blocks_wanted(facts, account) > account.num_unreserved_blocks:
                continue
            key = (account.num_legs, -account.num_unreserved_blocks, account.worker_id)
            if best_key is None or key < best_key:
                best, best_key = account, key
        return best
