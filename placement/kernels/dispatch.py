"""Who gets a request: the router's own rules (`baton.policy`), written again so that numba can call them.

tests/placement asks both on random states; they must choose the same worker. The draw that decides
exact ties is part of the request, as it is in a recorded decision.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from placement.kernels.steps import Floats, Ints


@njit(cache=True, nogil=True)
def drawn(is_tied: Ints, num_tied: int, draw: int) -> int:
    left = draw % num_tied
    for worker in range(len(is_tied)):
        if is_tied[worker]:
            if left == 0:
                return worker
            left -= 1
    return -1


@njit(cache=True, nogil=True)
def pick_prefill(queued: Ints, legs: Ints, num_prompt_tokens: int, window: int, draw: int, tied: Ints) -> int:
    """`p-token` without hits among those with room in their window; −1: nobody has room."""
    best_queued, best_legs, num_tied = -1, -1, 0
    for w in range(len(queued)):
        tied[w] = 0
        if queued[w] > 0 and queued[w] + num_prompt_tokens > window:
            continue
        if num_tied == 0 or queued[w] < best_queued or (queued[w] == best_queued and legs[w] < best_legs):
            for other in range(w):
                tied[other] = 0
            best_queued, best_legs, num_tied = queued[w], legs[w], 1
            tied[w] = 1
        elif queued[w] == best_queued and legs[w] == best_legs:
            tied[w] = 1
            num_tied += 1
    return drawn(tied, num_tied, draw) if num_tied else -1


@njit(cache=True, nogil=True)
def pick_decode(
    legs: Ints, kv_tokens: Floats, free: Ints, need: int, max_batch: int, draw: int, tied: Ints
) -> int:
    """`smallest-batch` among those with room for the request; −1: nobody has room."""
    best_legs, best_kv, num_tied = -1, 0.0, 0
    for w in range(len(legs)):
        tied[w] = 0
        if legs[w] >= max_batch or free[w] < need:
            continue
        if num_tied == 0 or legs[w] < best_legs or (legs[w] == best_legs and kv_tokens[w] < best_kv):
            for other in range(w):
                tied[other] = 0
            best_legs, best_kv, num_tied = legs[w], kv_tokens[w], 1
            tied[w] = 1
        elif legs[w] == best_legs and kv_tokens[w] == best_kv:
            tied[w] = 1
            num_tied += 1
    return drawn(tied, num_tied, draw) if num_tied else -1


@njit(cache=True, nogil=True)
def pick_colocated(queued: Ints, legs: Ints, num_new_tokens: int, draw: int, tied: Ints) -> int:
    """`lmetric` without hits: P-token × batch, then the smaller batch."""
    best_score, best_batch, num_tied = np.int64(-1), np.int64(-1), 0
    for w in range(len(queued)):
        tied[w] = 0
        batch = legs[w] + 1
        score = (queued[w] + num_new_tokens) * batch
        if num_tied == 0 or score < best_score or (score == best_score and batch < best_batch):
            for other in range(w):
                tied[other] = 0
            best_score, best_batch, num_tied = score, batch, 1
            tied[w] = 1
        elif score == best_score and batch == best_batch:
            tied[w] = 1
            num_tied += 1
    return drawn(tied, num_tied, draw)
