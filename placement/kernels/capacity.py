"""How many prompts per second a prefill worker computes when its queue never empties."""

from __future__ import annotations

from numba import njit

from placement.kernels.steps import Floats, Ints, prefill_cadence_s


@njit(cache=True, nogil=True)
def prefill_capacity(table: Floats, prompt: Ints, cached: Ints, batch_tokens: int) -> float:
    """In the order of arrival, batches cut at `batch_tokens`."""
    spent_s, tokens, pairs = 0.0, 0, 0.0
    for i in range(len(prompt)):
        new = prompt[i] - cached[i]
        if tokens > 0 and tokens + new > batch_tokens:
            spent_s += prefill_cadence_s(table, float(tokens), pairs)
            tokens, pairs = 0, 0.0
        tokens += new
        pairs += new * (cached[i] + (new + 1) / 2.0)
    spent_s += prefill_cadence_s(table, float(tokens), pairs)
    return len(prompt) / spent_s
