"""P-token x batch size: LMetric (OSDI'26, arXiv 2603.15202), the product's default.

score = (uncached tokens queued there + uncached tokens of this prompt) x (running + queued + 1)

Optimises time to first token (the first factor: what must be computed before it) and time per
token (the second) without weights: two candidates are compared by the ratio of one factor against
the ratio of the other, so the units cancel. Equal products go to fewer legs, then to
whoever was chosen longest ago: where nothing is in flight, that is all there is to share work by.

Reads hits, queued tokens, legs, turns. Does badly when many requests share a long prefix that few workers
hold: with hit fraction h it accepts a batch 1/(1-h) times the others' before it spills (10x at
0.9), see `hotspot`. On a pure prefill pool the batch mostly repeats the queue; the paper advises
`p-token` there. Blind to output length and context length.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless
from baton.policy.ledger import WorkerAccount


class LMetric(Memoryless):
    name = "lmetric"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        batch = candidates.batch
        return candidates.p_tokens * batch, batch, candidates.last_turn

    def rank_one(self, account: WorkerAccount, num_uncached_tokens: int) -> tuple[int, ...]:
        batch = account.num_legs + 1
        return (account.num_queued_tokens + num_uncached_tokens) * batch, batch, account.last_turn
