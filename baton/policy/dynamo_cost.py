"""Dynamo's KV router cost, temperature 0: credited prefill blocks + decode blocks.

    prefill = max(0, (queued prefill tokens + this prompt) / block - credit x hit blocks)
    cost    = scale x prefill + KV blocks there with this request + weight x requests

(ai-dynamo lib/kv-router selector.rs, read Aug 2026: credit 1, scale 1, weight 0 by default; host
and disk tiers, decay and softmax left away.) Optimises a sum of compute and memory load in blocks.

Reads hits, queued tokens, KV tokens, legs. Does badly where one term outgrows the other: long
contexts make decode blocks drown the cache term, and a block of prefill is not worth a block of
resident KV in any unit.
"""

from __future__ import annotations

import numpy as np

from baton.policy.base import Candidates, Key, Memoryless


class DynamoCost(Memoryless):
    def __init__(
        self, overlap_credit: float = 1.0, prefill_scale: float = 1.0, request_weight: float = 0.0
    ) -> None:
        self._credit = overlap_credit
        self._scale = prefill_scale
        self._request_weight = request_weight
        self.name = "dynamo" if overlap_credit == 1 else f"dynamo:{overlap_credit:g}"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        block = candidates.block_size_tokens
        prompt = candidates.facts.num_prompt_tokens
        hit_blocks = candidates.hit_tokens // block
        prefill = np.maximum(0.0, (candidates.num_queued_tokens + prompt) / block - self._credit * hit_blocks)
        decode = -(-candidates.num_kv_tokens // block) + -(-prompt // block)
        return (self._scale * prefill + decode + self._request_weight * candidates.num_legs,)
