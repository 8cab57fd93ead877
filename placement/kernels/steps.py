"""Step times from tables, and the closed form of a run of decode steps.

With a fixed batch a decode step is linear in the context, and the context grows by the batch with each
step. So k steps take an arithmetic series: k·(α + β·context) + β·batch·k(k−1)/2. Between a join and a
leave nothing else happens, and a request costs two events instead of one per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@njit(cache=True, nogil=True)
def bracket(grid: Floats, value: float) -> int:
    """The interval of a rising grid that holds `value`; the outermost ones serve what lies beyond."""
    low, high = 0, len(grid) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if grid[middle] <= value:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def interpolated(grid: Floats, intercept: Floats, slope: Floats, at: float, pairs: float) -> float:
    """(intercept + slope·pairs), both interpolated at `at`."""
    k = bracket(grid, at)
    share = (at - grid[k]) / (grid[k + 1] - grid[k])
    return (intercept[k] + share * (intercept[k + 1] - intercept[k])) + pairs * (
        slope[k] + share * (slope[k + 1] - slope[k])
    )


@njit(cache=True, nogil=True)
def prefill_step_s(table: Floats, num_tokens: float, pairs: float) -> float:
    """From launch to the first tokens, through all stages."""
    return interpolated(table[0], table[1], table[2], num_tokens, pairs)


@njit(cache=True, nogil=True)
def prefill_cadence_s(table: Floats, num_tokens: float, pairs: float) -> float:
    """Until the first stage takes the next batch."""
    return interpolated(table[0], table[3], table[4], num_tokens, pairs)


@njit(cache=True, nogil=True)
def mixed_step_s(
    tokens_grid: Floats, batch_grid: Floats, terms: Floats,
    num_tokens: float, pairs: float, batch: float, context: float,
) -> float:  # fmt: skip
    """Prompt chunk and decodes in one step; `terms[:, i, j]` are intercept, per pair, per context token."""
    i, j = bracket(tokens_grid, num_tokens), bracket(batch_grid, batch)
    u = (num_tokens - tokens_grid[i]) / (tokens_grid[i + 1] - tokens_grid[i])
    v = (batch - batch_grid[j]) / (batch_grid[j + 1] - batch_grid[j])
    total = 0.0
    for term in range(3):
        weight = 1.0 if term == 0 else (pairs if term == 1 else context)
        t = terms[term]
        total += weight * (
            (1 - u) * ((1 - v) * t[i, j] + v * t[i, j + 1])
            + u * ((1 - v) * t[i + 1, j] + v * t[i + 1, j + 1])
        )
    return total


@njit(cache=True, nogil=True)
def run_s(first_s: float, growth_s: float, num_steps: float) -> float:
    """Seconds of `num_steps` steps, the first taking `first_s` and each `growth_s` more than the last."""
    return num_steps * first_s + growth_s * (num_steps * (num_steps - 1.0) / 2.0)


@njit(cache=True, nogil=True)
def steps_until(first_s: float, growth_s: float, span_s: float) -> int:
    """The fewest steps that take at least `span_s`: who joins meanwhile waits for their end."""
    if span_s <= 0.0:
        return 0
    if growth_s > 0.0:
        half = first_s - growth_s / 2.0
        steps = 2.0 * span_s / (half + np.sqrt(half * half + 2.0 * growth_s * span_s))
    else:
        steps = span_s / first_s
    k = int(np.ceil(steps))
    while k > 1 and run_s(first_s, growth_s, k - 1.0) >= span_s:
        k -= 1
    while run_s(first_s, growth_s, float(k)) < span_s:
        k += 1
    return k


@njit(cache=True, nogil=True)
def steps_within(first_s: float, growth_s: float, span_s: float) -> int:
    """How many whole steps fit into `span_s`."""
    k = steps_until(first_s, growth_s, span_s)
    return k if k == 0 or run_s(first_s, growth_s, float(k)) <= span_s else k - 1


@njit(cache=True, nogil=True)
def push_int(heap: Ints, size: int, value: int) -> None:
    """Onto a binary heap of `size` entries; the caller counts."""
    child = size
    while child > 0:
        parent = (child - 1) >> 1
        if heap[parent] <= value:
            break
        heap[child] = heap[parent]
        child = parent
    heap[child] = value


@njit(cache=True, nogil=True)
def pop_int(heap: Ints, size: int) -> int:
    """The smallest of `size` entries; the caller counts."""
    smallest = heap[0]
    last = heap[size - 1]
    size -= 1
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= last:
            break
        heap[at] = heap[child]
        at = child
    if size > 0:
        heap[at] = last
    return smallest


@njit(cache=True, nogil=True)
def push_timed(times: Floats, ids: Ints, size: int, time_s: float, value: int) -> None:
    child = size
    while child > 0:
        parent = (child - 1) >> 1
        if times[parent] <= time_s:
            break
        times[child] = times[parent]
        ids[child] = ids[parent]
        child = parent
    times[child] = time_s
    ids[child] = value


@njit(cache=True, nogil=True)
def pop_timed(times: Floats, ids: Ints, size: int) -> int:
    first = ids[0]
    time_s, value = times[size - 1], ids[size - 1]
    size -= 1
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and times[child + 1] < times[child]:
            child += 1
        if times[child] >= time_s:
            break
        times[at] = times[child]
        ids[at] = ids[child]
        at = child
    if size > 0:
        times[at] = time_s
        ids[at] = value
    return first
