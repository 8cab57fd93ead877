"""Decode: the fewest tokens in KV among workers with room; the smaller batch decides ties.

A decode step reads the whole context of every sequence, so with long contexts time per token
follows total tokens rather than their number. Reads KV tokens and legs. Does badly on short
contexts, where the per-sequence cost dominates and one long context counts as many sequences.
"""

from __future__ import annotations

from baton.policy.base import Candidates, Key, Memoryless


class FewestKvTokens(Memoryless):
    name = "fewest-kv-tokens"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return candidates.num_kv_tokens, candidates.num_legs
