"""A fleet with prefill and decode on separate workers.

Events: a request arrives, a first stage becomes free, a prompt is computed, its KV has arrived, a decode
batch loses members. Per request that is five, whatever its length.

Prefill: first come first served, one batch of prompts up to `batch_tokens` at a time; the next batch may
enter the first stage `cadence` after, and leaves the last one a `cadence` after the batch before it or a
whole `step` after its own start, whichever is later (exact for stages of equal length).
KV: a prompt holds its tokens on the prefill worker from its start until its transfer ends; decode workers
pull when they have room for prompt and output, in order. So prefill memory is the queue, and a full one
stops the worker. Transfers wait for the source's and the destination's link.
Decode: a request joins at the next step boundary and gets one token per step until it leaves.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from placement.kernels.dispatch import pick_decode, pick_prefill
from placement.kernels.steps import (
    Floats,
    Ints,
    pop_int,
    pop_timed,
    prefill_cadence_s,
    prefill_step_s,
    push_int,
    push_timed,
    run_s,
    steps_until,
    steps_within,
)

_ARRIVAL, _WAKE, _COMPUTED, _LANDED, _LEAVE = 0, 1, 2, 3, 4


@njit(cache=True, nogil=True)
def simulate_split(
    arrival: Floats, prompt: Ints, cached: Ints, output: Ints, draw: Ints,
    prefill_table: Floats, num_prefill: int, prefill_kv_tokens: int, batch_tokens: int, window_tokens: int,
    alpha: Floats, beta: Floats, num_decode: int, decode_kv_tokens: int, max_batch: int,
    link_kind: Ints, source_node: Ints, target_node: Ints, link_base_s: Floats, link_token_s: Floats,
    ttft_limit_s: float, tpot_limit_s: float, first_counted: int, end_counted: int, max_failures: int,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Times [started, computed (first token), assigned to a decode worker, landed there, ended] per
    request, and busy seconds per worker, prefill workers first. Every request must fit its worker alone. Ends
    early, with infinite times, once more than `max_failures` requests from `first_counted` on have missed
    a limit."""
    n = len(arrival)
    inf = np.inf
    times = np.full((5, n), inf)
    started, computed, assigned, landed, ended = times[0], times[1], times[2], times[3], times[4]
    busy = np.zeros(num_prefill + num_decode)
    on_prefill = np.full(n, -1, np.int64)
    on_decode = np.full(n, -1, np.int64)
    next_one = np.full(n, -1, np.int64)

    wait_head = np.full(num_prefill, -1, np.int64)
    wait_tail = np.full(num_prefill, -1, np.int64)
    fly_head = np.full(num_prefill, -1, np.int64)
    fly_tail = np.full(num_prefill, -1, np.int64)
    stage_free = np.zeros(num_prefill)
    last_finish = np.zeros(num_prefill)
    wake = np.full(num_prefill, inf)
    p_queued = np.zeros(num_prefill, np.int64)
    p_legs = np.zeros(num_prefill, np.int64)
    p_free = np.full(num_prefill, prefill_kv_tokens, np.int64)
    p_tied = np.zeros(num_prefill, np.int64)
    p_turn = np.zeros(num_prefill, np.int64)

    ready = np.empty(n, np.int64)
    ready_head, ready_tail = 0, 0
    fly_times = np.empty(n)
    fly_ids = np.empty(n, np.int64)
    num_flying = 0
    free_source = np.zeros((2, max(num_prefill, int(source_node.max()) + 1)))
    free_target = np.zeros((2, max(num_decode, int(target_node.max()) + 1)))

    clock = np.zeros(num_decode)
    token_clock = np.zeros(num_decode, np.int64)
    batch = np.zeros(num_decode, np.int64)
    context = np.zeros(num_decode)
    leave_at = np.full(num_decode, inf)
    members = np.empty((num_decode, max_batch + 1), np.int64)
    d_legs = np.zeros(num_decode, np.int64)
    d_pending = np.zeros(num_decode)
    d_free = np.full(num_decode, decode_kv_tokens, np.int64)
    d_tied = np.zeros(num_decode, np.int64)
    d_turn = np.zeros(num_decode, np.int64)
    d_kv = np.zeros(num_decode)

    num_arrived, num_dispatched, num_done = 0, 0, 0
    num_failed = 0
    kick = np.empty(num_prefill, np.int64)
    while num_done < n and num_failed <= max_failures:
        now, kind, who = inf, -1, -1
        if num_arrived < n:
            now, kind = arrival[num_arrived], _ARRIVAL
        for p in range(num_prefill):
            if wake[p] < now:
                now, kind, who = wake[p], _WAKE, p
            if fly_head[p] >= 0 and computed[fly_head[p]] < now:
                now, kind, who = computed[fly_head[p]], _COMPUTED, p
        if num_flying and fly_times[0] < now:
            now, kind = fly_times[0], _LANDED
        for d in range(num_decode):
            if leave_at[d] < now:
                now, kind, who = leave_at[d], _LEAVE, d
        if kind < 0:
            break
        num_kicked = 0
        must_drain = False

        if kind == _ARRIVAL:
            num_arrived += 1
        elif kind == _WAKE:
            wake[who] = inf
            kick[0] = who
            num_kicked = 1
        elif kind == _COMPUTED:
            # The whole batch before anybody is dispatched: its prompts end together.
            while fly_head[who] >= 0 and computed[fly_head[who]] <= now:
                i = fly_head[who]
                fly_head[who] = next_one[i]
                p_queued[who] -= prompt[i] - cached[i]
                if first_counted <= i < end_counted and now - arrival[i] > ttft_limit_s:
                    num_failed += 1
                if output[i] <= 1:
                    p_free[who] += prompt[i]
                    p_legs[who] -= 1
                    assigned[i] = landed[i] = ended[i] = now
                    num_done += 1
                    kick[0] = who
                    num_kicked = 1
                else:
                    ready[ready_tail] = i
                    ready_tail += 1
                    must_drain = True
        elif kind == _LANDED:
            i = pop_timed(fly_times, fly_ids, num_flying)
            num_flying -= 1
            p, d = on_prefill[i], on_decode[i]
            p_free[p] += prompt[i]
            p_legs[p] -= 1
            kick[0] = p
            num_kicked = 1
            b = batch[d]
            if b == 0:
                clock[d] = now
            else:
                first_s = alpha[b] + beta[b] * context[d]
                k = steps_until(first_s, beta[b] * b, now - clock[d])
                k = min(k, members[d, 0] // n - token_clock[d])
                if k > 0:
                    spent_s = run_s(first_s, beta[b] * b, float(k))
                    busy[num_prefill + d] += spent_s
                    clock[d] += spent_s
                    token_clock[d] += k
                    context[d] += float(b * k)
            push_int(members[d], b, (token_clock[d] + output[i] - 1) * n + i)
            batch[d] = b + 1
            context[d] += prompt[i] + 1
            d_pending[d] -= prompt[i]
            b += 1
            leave_at[d] = clock[d] + run_s(
                alpha[b] + beta[b] * context[d], beta[b] * b, float(members[d, 0] // n - token_clock[d])
            )
        else:
            d = who
            b = batch[d]
            k = members[d, 0] // n - token_clock[d]
            busy[num_prefill + d] += now - clock[d]
            clock[d] = now
            token_clock[d] += k
            context[d] += float(b * k)
            while b > 0 and members[d, 0] // n == token_clock[d]:
                i = pop_int(members[d], b) % n
                b -= 1
                ended[i] = now
                if (
                    first_counted <= i < end_counted
                    and now - computed[i] > tpot_limit_s * (output[i] - 1)
                    and computed[i] - arrival[i] <= ttft_limit_s
                ):
                    num_failed += 1
                context[d] -= prompt[i] + output[i]
                d_free[d] += prompt[i] + output[i]
                d_legs[d] -= 1
                num_done += 1
            batch[d] = b
            if b:
                leave_at[d] = now + run_s(
                    alpha[b] + beta[b] * context[d], beta[b] * b, float(members[d, 0] // n - token_clock[d])
                )
            else:
                leave_at[d] = inf
                context[d] = 0.0
            must_drain = True

        if kind in (_ARRIVAL, _COMPUTED):
            while num_dispatched < num_arrived:
                i = num_dispatched
                p = pick_prefill(p_queued, p_legs, p_turn, prompt[i], window_tokens, draw[i], p_tied)
                if p < 0:
                    break
                num_dispatched += 1
                on_prefill[i] = p
                p_turn[p] = num_dispatched
                p_queued[p] += prompt[i] - cached[i]
                p_legs[p] += 1
                if wait_head[p] < 0:
                    wait_head[p] = i
                else:
                    next_one[wait_tail[p]] = i
                wait_tail[p] = i
                if stage_free[p] > now:
                    wake[p] = stage_free[p]
                else:
                    _start(
                        p, now, prompt, cached, prefill_table, batch_tokens, wait_head, fly_head, fly_tail,
                        next_one, p_free, stage_free, last_finish, wake, started, computed, busy,
                    )  # fmt: skip
        for index in range(num_kicked):
            p = kick[index]
            if wait_head[p] >= 0 and stage_free[p] <= now:
                _start(
                    p, now, prompt, cached, prefill_table, batch_tokens, wait_head, fly_head, fly_tail,
                    next_one, p_free, stage_free, last_finish, wake, started, computed, busy,
                )  # fmt: skip
        while must_drain and ready_head < ready_tail:
            i = ready[ready_head]
            for d in range(num_decode):
                d_kv[d] = d_pending[d] + context[d] - batch[d]  # what the ledger counts
                b = batch[d]
                if b and num_decode > 1:
                    first_s = alpha[b] + beta[b] * context[d]
                    d_kv[d] += b * steps_within(first_s, beta[b] * b, now - clock[d])
            d = pick_decode(
                d_legs, d_kv, d_turn, d_free, prompt[i] + output[i], max_batch, draw[i] >> 16, d_tied
            )
            if d < 0:
                break
            ready_head += 1
            p = on_prefill[i]
            on_decode[i] = d
            d_turn[d] = ready_head
            assigned[i] = now
            d_legs[d] += 1
            d_pending[d] += prompt[i]
            d_free[d] -= prompt[i] + output[i]
            link = link_kind[p, d]
            source = source_node[p] if link else p
            target = target_node[d] if link else d
            end = max(now, free_source[link, source], free_target[link, target])
            end += link_base_s[link] + prompt[i] * link_token_s[link]
            free_source[link, source] = end
            free_target[link, target] = end
            landed[i] = end
            push_timed(fly_times, fly_ids, num_flying, end, i)
            num_flying += 1
    return times, busy


@njit(cache=True, nogil=True)
def _start(
    p: int, now: float, prompt: Ints, cached: Ints, table: Floats, batch_tokens: int,
    wait_head: Ints, fly_head: Ints, fly_tail: Ints, next_one: Ints, free: Ints,
    stage_free: Floats, last_finish: Floats, wake: Floats, started: Floats, computed: Floats, busy: Floats,
) -> None:  # fmt: skip
    """The prompts at the head of the queue, as many as one batch and the free KV memory take."""
    num_tokens, pairs, count = 0, 0.0, 0
    i = wait_head[p]
    first = i
    last = -1
    while i >= 0:
        new = prompt[i] - cached[i]
        if prompt[i] > free[p] or (count > 0 and num_tokens + new > batch_tokens):
            break
        free[p] -= prompt[i]
        num_tokens += new
        pairs += new * (cached[i] + (new + 1) / 2.0)
        count += 1
        last = i
        i = next_one[i]
    if count == 0:
        return  # a transfer that ends frees memory and kicks again
    cadence_s = prefill_cadence_s(table, float(num_tokens), pairs)
    finish = max(now + prefill_step_s(table, float(num_tokens), pairs), last_finish[p] + cadence_s)
    last_finish[p] = finish
    stage_free[p] = now + cadence_s
    busy[p] += cadence_s
    wait_head[p] = i
    next_one[last] = -1
    if fly_head[p] < 0:
        fly_head[p] = first
    else:
        next_one[fly_tail[p]] = first
    fly_tail[p] = last
    j = first
    while j >= 0:
        started[j] = now
        computed[j] = finish
        j = next_one[j]
    if i >= 0:
        wake[p] = stage_free[p]
