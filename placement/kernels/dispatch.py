"""Who gets a request: the router's own rules (`baton.policy`), written again so that numba can call them.

tests/placement asks both on random states; they must choose the same worker. Equal workers take
turns: the one chosen longest ago. Among those never chosen a draw decides, which is part of the
request, as it is in a recorded decision.
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
def compared(first: float, second: float, third: float) -> int:
    """Sign of the first difference that is not zero: below 0 is better."""
    if first != 0:
        return -1 if first < 0 else 1
    if second != 0:
        return -1 if second < 0 else 1
    return -1 if third < 0 else int(third > 0)


@njit(cache=True, nogil=True)
def pick_prefill(
    queued: Ints, legs: Ints, turn: Ints, num_prompt_tokens: int, window: int, draw: int, tied: Ints
) -> int:
    """`p-token` without hits among those with room in their window; −1: nobody has room."""
    best, num_tied = -1, 0
    for w in range(len(queued)):
        tied[w] = 0
        if queued[w] > 0 and queued[w] + num_prompt_tokens > window:
            continue
        order = (
            0 if best < 0 else compared(queued[w] - queued[best], legs[w] - legs[best], turn[w] - turn[best])
        )
        if best < 0 or order < 0:
            tied[:w] = 0
            best, num_tied = w, 0
        if order <= 0:
            tied[w] = 1
            num_tied += 1
    return drawn(tied, num_tied, draw) if num_tied else -1


@njit(cache=True, nogil=True)
def pick_decode(
    legs: Ints, kv_tokens: Floats, turn: Ints, free: Ints, need: int, max_batch: int, draw: int, tied: Ints
) -> int:
    """`smallest-batch` among those with room for the request; −1: nobody has room."""
    best, num_tied = -1, 0
    for w in range(len(legs)):
        tied[w] = 0
        if legs[w] >= max_batch or free[w] < need:
            continue
        order = 0
        if best >= 0:
            order = compared(legs[w] - legs[best], kv_tokens[w] - kv_tokens[best], turn[w] - turn[best])
        if best < 0 or order < 0:
            tied[:w] = 0
            best, num_tied = w, 0
        if order <= 0:
            tied[w] = 1
            num_tied += 1
    return drawn(tied, num_tied, draw) if num_tied else -1


@njit(cache=True, nogil=True)
def pick_colocated(queued: Ints, legs: Ints, turn: Ints, num_new_tokens: int, draw: int, tied: Ints) -> int:
    """`lmetric` without hits: P-token × batch, then the smaller batch."""
    best, best_score, num_tied = -1, np.int64(0), 0
    for w in range(len(queued)):
        tied[w] = 0
        batch = legs[w] + 1
        score = (queued[w] + num_new_tokens) * batch
        order = 0
        if best >= 0:
            order = compared(score - best_score, legs[w] - legs[best], turn[w] - turn[best])
        if best < 0 or order < 0:
            tied[:w] = 0
            best, best_score, num_tied = w, score, 0
        if order <= 0:
            tied[w] = 1
            num_tied += 1
    return drawn(tied, num_tied, draw)
