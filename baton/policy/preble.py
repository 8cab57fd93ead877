"""Preble (ICLR'25) as the LMetric paper compares it: exploit a long hit, else explore by recent load.

If the best hit covers more than `threshold` of the prompt: most hits, then fewest P-tokens.
Otherwise: smallest alpha x (uncached tokens routed there in the last 3 minutes) + beta x (requests
routed there in the last 3 minutes). Preble profiles alpha and beta per GPU; the defaults are the
seconds that one prefill token and one request's decode take in the timing table of dynamo.replay
1.6.1 (48k tokens/s; 45 tokens of 13.5 us each).

Reads hits, queued tokens, and its own window. Does badly when load changes faster than its window,
and when a popular prefix passes the threshold: it then ignores load altogether.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from baton.policy.base import Candidates, Key


class Preble:
    def __init__(
        self,
        threshold: float = 0.5,
        *,
        window_s: float = 180.0,
        prefill_s_per_token: float = 2.1e-5,
        decode_s_per_request: float = 6e-4,
    ) -> None:
        self.name = "preble" if threshold == 0.5 else f"preble:{threshold:g}"
        self._threshold = threshold
        self._window_s = window_s
        self._alpha = prefill_s_per_token
        self._beta = decode_s_per_request
        self._routed: deque[tuple[float, int, int]] = deque()
        """Time, slot and uncached tokens of each request in the window."""
        self._tokens: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._requests: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        hits = candidates.hit_tokens
        if int(hits.max()) > self._threshold * candidates.facts.num_prompt_tokens:
            return -hits, candidates.p_tokens
        self._slide(candidates)
        tokens = candidates.given("window_tokens", lambda: self._tokens.take(candidates.slots))
        requests = candidates.given("window_requests", lambda: self._requests.take(candidates.slots))
        return (self._alpha * tokens + self._beta * requests,)

    def committed(self, candidates: Candidates, position: int) -> None:
        self._slide(candidates)
        slot = int(candidates.slots[position])
        uncached = candidates.facts.num_prompt_tokens - int(candidates.hit_tokens[position])
        self._routed.append((candidates.now_s, slot, uncached))
        self._tokens[slot] += uncached
        self._requests[slot] += 1

    def _slide(self, candidates: Candidates) -> None:
        num_slots = int(candidates.slots.max()) + 1
        if num_slots > len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros(num_slots - len(self._tokens), np.int64)])
            self._requests = np.concatenate(
                [self._requests, np.zeros(num_slots - len(self._requests), np.int64)]
            )
        while self._routed and self._routed[0][0] <= candidates.now_s - self._window_s:
            _, slot, tokens = self._routed.popleft()
            self._tokens[slot] -= tokens
            self._requests[slot] -= 1
