"""Prefill: the worker with the fewest prompt tokens still to compute.

Optimises time to first token while prompts share nothing; blind to prefix caches, so it does badly
on multi-turn sessions, whose KV lies on one particular worker.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.policy.base import RequestFacts
from baton.policy.ledger import WorkerAccount


class FewestQueuedTokens:
    name = "fewest-queued-tokens"

    def choose(self, facts: RequestFacts, accounts: Sequence[WorkerAccount]) -> WorkerAccount | None:
        """Ties go to fewer legs, then to the worker id, so that a decision can be replayed."""
        if len(accounts) == 1:
            return accounts[0]
        return min(accounts, key=lambda a: (a.num_queued_tokens, a.num_legs, a.worker_id), default=None)
