"""The baseline: workers that do both phases, with prompts whole (first) or in chunks beside decodes.

Whole prompts: while any prompt waits and fits, the next step is a prefill batch, as vLLM did before
chunking; everybody's next token waits for it. Chunked: each step has a token budget, decodes take theirs
first, prompts fill the rest. KV for prompt and output is promised at the start, so nobody is preempted.

Workers meet only in the dispatch of arrivals, so each is advanced to the time of an arrival and no
further. Runs of pure decode steps use the closed form.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from placement.kernels.dispatch import pick_colocated
from placement.kernels.steps import (
    Floats,
    Ints,
    mixed_step_s,
    pop_int,
    prefill_cadence_s,
    prefill_step_s,
    push_int,
    run_s,
    steps_until,
)

_IDLE, _PREFILL, _CHUNK = 0, 1, 2


@njit(cache=True, nogil=True)
def simulate_colocated(
    arrival: Floats, prompt: Ints, cached: Ints, output: Ints, draw: Ints,
    num_workers: int, kv_tokens: int, max_batch: int, batch_tokens: int, is_chunked: bool,
    prefill_table: Floats, alpha: Floats, beta: Floats,
    mixed_tokens: Floats, mixed_batch: Floats, mixed_terms: Floats,
    ttft_limit_s: float, tpot_limit_s: float, first_counted: int, end_counted: int, max_failures: int,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Times [started, first token, ended] per request, and busy seconds per worker. Ends early as
    `simulate_split` does."""
    num_failed = 0
    n = len(arrival)
    times = np.full((3, n), np.inf)
    busy = np.zeros(num_workers)
    next_one = np.full(n, -1, np.int64)
    done_tokens = cached.copy()
    head = np.full(num_workers, -1, np.int64)
    tail = np.full(num_workers, -1, np.int64)
    open_to = np.full(num_workers, -1, np.int64)  # last prompt that holds KV but is not computed
    queued = np.zeros(num_workers, np.int64)
    legs = np.zeros(num_workers, np.int64)
    tied = np.zeros(num_workers, np.int64)
    turn = np.zeros(num_workers, np.int64)
    free = np.full(num_workers, kv_tokens, np.int64)
    seated = np.zeros(num_workers, np.int64)
    clock = np.zeros(num_workers)
    token_clock = np.zeros(num_workers, np.int64)
    batch = np.zeros(num_workers, np.int64)
    context = np.zeros(num_workers)
    members = np.empty((num_workers, max_batch + 1), np.int64)
    doing = np.zeros(num_workers, np.int64)
    step_end = np.zeros(num_workers)
    step_tokens = np.zeros(num_workers, np.int64)
    for i in range(n + 1):
        until = arrival[i] if i < n else np.inf
        if num_failed > max_failures:
            break
        for w in range(num_workers):
            while True:
                # What was under way has ended.
                if doing[w] != _IDLE:
                    if step_end[w] > until:
                        break
                    clock[w] = step_end[w]
                    if doing[w] == _CHUNK:
                        token_clock[w] += 1
                        context[w] += batch[w]
                    left = step_tokens[w]
                    queued[w] -= left
                    while left > 0:
                        j = head[w]
                        part = min(left, prompt[j] - done_tokens[j])
                        done_tokens[j] += part
                        left -= part
                        if done_tokens[j] < prompt[j]:
                            break
                        if open_to[w] == j:
                            open_to[w] = -1
                        head[w] = next_one[j]
                        if doing[w] == _CHUNK:
                            times[1, j] = clock[w]
                        if first_counted <= j < end_counted and times[1, j] - arrival[j] > ttft_limit_s:
                            num_failed += 1
                        if output[j] <= 1:
                            times[2, j] = times[1, j]
                            free[w] += prompt[j] + output[j]
                            seated[w] -= 1
                            legs[w] -= 1
                        else:
                            push_int(members[w], batch[w], (token_clock[w] + output[j] - 1) * n + j)
                            batch[w] += 1
                            context[w] += prompt[j] + 1
                    doing[w] = _IDLE
                if clock[w] > until:
                    break
                while batch[w] > 0 and members[w, 0] // n == token_clock[w]:
                    j = pop_int(members[w], batch[w]) % n
                    batch[w] -= 1
                    context[w] -= prompt[j] + output[j]
                    free[w] += prompt[j] + output[j]
                    seated[w] -= 1
                    legs[w] -= 1
                    times[2, j] = clock[w]
                    if (
                        first_counted <= j < end_counted
                        and clock[w] - times[1, j] > tpot_limit_s * (output[j] - 1)
                        and times[1, j] - arrival[j] <= ttft_limit_s
                    ):
                        num_failed += 1
                # The next step: prompts that hold KV or can get it now, up to the budget.
                b = batch[w]
                budget = batch_tokens - (b if is_chunked else 0)
                tokens, pairs = 0, 0.0
                j = head[w]
                is_open = open_to[w] >= 0
                while j >= 0 and budget - tokens > 0:
                    new = prompt[j] - done_tokens[j]
                    if not is_chunked and tokens > 0 and tokens + new > batch_tokens:
                        break
                    if not is_open:
                        if prompt[j] + output[j] > free[w] or seated[w] >= max_batch:
                            break
                        free[w] -= prompt[j] + output[j]
                        seated[w] += 1
                        open_to[w] = j
                        times[0, j] = clock[w]
                    elif open_to[w] == j:
                        is_open = False
                    part = min(new, budget - tokens) if is_chunked else new
                    pairs += part * (done_tokens[j] + (part + 1) / 2.0)
                    tokens += part
                    if part < new:
                        break
                    j = next_one[j]
                if tokens > 0:
                    if is_chunked:
                        doing[w] = _CHUNK
                        spent_s = mixed_step_s(
                            mixed_tokens, mixed_batch, mixed_terms, float(tokens), pairs, float(b), context[w]
                        )
                    else:
                        doing[w] = _PREFILL
                        spent_s = prefill_cadence_s(prefill_table, float(tokens), pairs)
                        first_s = clock[w] + prefill_step_s(prefill_table, float(tokens), pairs)
                        j, left = head[w], tokens
                        while left > 0:
                            times[1, j] = first_s
                            left -= prompt[j] - done_tokens[j]
                            j = next_one[j]
                    step_tokens[w] = tokens
                    step_end[w] = clock[w] + spent_s
                    busy[w] += spent_s
                    continue
                if b == 0:
                    break
                first_s = alpha[b] + beta[b] * context[w]
                k = members[w, 0] // n - token_clock[w]
                if until < np.inf:
                    # At least one step: at this boundary there was nothing else to do.
                    k = min(k, max(1, steps_until(first_s, beta[b] * b, until - clock[w])))
                spent_s = run_s(first_s, beta[b] * b, float(k))
                busy[w] += spent_s
                clock[w] += spent_s
                token_clock[w] += k
                context[w] += float(b * k)
        if i == n:
            break
        w = pick_colocated(queued, legs, turn, prompt[i] - cached[i], draw[i], tied)
        turn[w] = i + 1
        queued[w] += prompt[i] - cached[i]
        legs[w] += 1
        if head[w] < 0:
            head[w] = i
        else:
            next_one[tail[w]] = i
        tail[w] = i
        if doing[w] == _IDLE and batch[w] == 0 and clock[w] < until:
            clock[w] = until
    return times, busy
