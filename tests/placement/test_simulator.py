"""The compiled simulator against the slow one, and against what can be said by hand."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from baton.contract.messages import WorkerCapacity
from baton.policy.base import Candidates, RequestFacts, choose
from baton.policy.ledger import Ledger, Pool
from baton.policy.lmetric import LMetric
from baton.policy.p_token import PToken
from baton.policy.room import slots_with_prefill_room, slots_with_room
from baton.policy.smallest_batch import SmallestBatch
from baton.step_time import LinearStepTime, StepWork, prefill_pairs
from placement.kernels.dispatch import pick_colocated, pick_decode, pick_prefill
from placement.kernels.steps import prefill_cadence_s, prefill_step_s, run_s, steps_until
from placement.requests import Requests, make_requests
from placement.simulator import UNLIMITED, ColocatedFleet, Links, SplitFleet, simulate
from placement.step_table import max_prefill_error, tabulate, tabulate_mixed
from tests.placement.oracle import DecodeWorker, Job, PrefillWorker, simulate_slowly

PREFILL: dict[str, Any] = {"base_s": 0.015, "per_prefill_token_s": 7e-5, "per_prefill_pair_s": 5e-9}
DECODE: dict[str, Any] = {"base_s": 0.02, "per_decode_s": 4e-5, "per_context_token_s": 6e-7}
BOTH = {**PREFILL, **DECODE}


TOLD = ("num_queued_tokens", "num_legs", "last_turn")


def some_requests(count: int, seed: int, *, mean_prompt: int = 400, mean_output: int = 30) -> Requests:
    rng = np.random.default_rng(seed)
    prompt = np.maximum(4, rng.exponential(mean_prompt, count)).astype(np.int64)
    return make_requests(
        prompt,
        rng.integers(1, 2 * mean_output, count),
        gaps=rng.gamma(0.5, 1, count),
        num_cached_tokens=(prompt * rng.choice([0.0, 0.5], count)).astype(np.int64),
        seed=seed,
    )


@pytest.mark.parametrize(
    ("num_prefill", "num_decode", "stages_p", "stages_d", "kv_p", "kv_d", "window", "rate"),
    [
        pytest.param(1, 1, 1, 1, UNLIMITED, UNLIMITED, UNLIMITED, 4.0, id="1P1D, no limits"),
        pytest.param(2, 3, 1, 1, UNLIMITED, UNLIMITED, UNLIMITED, 12.0, id="2P3D"),
        pytest.param(2, 2, 3, 2, UNLIMITED, UNLIMITED, UNLIMITED, 12.0, id="pipelines"),
        pytest.param(1, 2, 1, 1, 6000, 9000, UNLIMITED, 20.0, id="KV memory binds on both sides"),
        pytest.param(3, 2, 2, 4, 8000, 7000, 1500, 60.0, id="everything, windows too"),
    ],
)
def test_agrees_with_the_slow_oracle(
    num_prefill, num_decode, stages_p, stages_d, kv_p, kv_d, window, rate
):  # fmt: skip
    requests = some_requests(400, seed=num_prefill + 10 * num_decode)
    requests = requests.only(requests.num_prompt_tokens < 5000)
    prefill = LinearStepTime(**PREFILL, num_stages=stages_p)
    decode = LinearStepTime(**DECODE, num_stages=stages_d)
    max_batch = 12
    node_p = [p % 2 for p in range(num_prefill)]
    node_d = [d % 2 for d in range(num_decode)]
    kind = np.array([[int(a != b) for b in node_d] for a in node_p])
    links = Links(
        kind=kind, source_node=np.array(node_p), target_node=np.array(node_d),
        base_s=np.array([1e-4, 1e-3]), token_s=np.array([1e-6, 3e-5]),
    )  # fmt: skip
    fleet = SplitFleet(
        prefill=tabulate(prefill, num_stages=stages_p, max_batch=1, max_tokens=8192), num_prefill=num_prefill,
        decode=tabulate(decode, num_stages=stages_d, max_batch=max_batch, max_tokens=8192),
        num_decode=num_decode, links=links, prefill_kv_tokens=kv_p, decode_kv_tokens=kv_d,
        batch_tokens=1024, window_tokens=window,
    )  # fmt: skip
    fast = simulate(fleet, requests, rate, with_parts=True)

    jobs = [Job(n, float(requests.arrival[n] / rate), **row_of(requests, n)) for n in range(len(requests))]
    simulate_slowly(
        jobs,
        [PrefillWorker(prefill, stages_p, kv_p, stage_free_s=[0.0] * stages_p) for _ in range(num_prefill)],
        [DecodeWorker(decode, stages_d, kv_d) for _ in range(num_decode)],
        batch_tokens=1024,
        window_tokens=window,
        max_batch=max_batch,
        transfer_s={
            (p, d): (
                ("net out", node_p[p]) if kind[p, d] else ("out", p),
                ("net in", node_d[d]) if kind[p, d] else ("in", d),
                links.base_s[kind[p, d]],
                links.token_s[kind[p, d]],
            )
            for p in range(num_prefill)
            for d in range(num_decode)
        },
    )
    ttft = np.array([job.first_s - job.arrival_s for job in jobs])
    tpot = np.array([(job.last_s - job.first_s) / max(1, job.output - 1) for job in jobs])
    np.testing.assert_allclose(fast.ttft_s, ttft, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fast.tpot_s, tpot, rtol=1e-9, atol=1e-9)
    if kv_d != UNLIMITED:
        assert fast.parts_s["room"].max() > 0.05  # the limit was met, or the case proves nothing


def row_of(requests: Requests, n: int) -> dict[str, Any]:
    names = ("prompt", "cached", "output", "draw")
    return {name: int(column[n]) for name, column in zip(names, columns_of(requests), strict=True)}


def columns_of(requests: Requests) -> tuple[np.ndarray, ...]:
    return (
        requests.num_prompt_tokens, requests.num_cached_tokens, requests.num_output_tokens, requests.draw,
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [None, 256], ids=["whole prompts", "chunks of 256"])
@pytest.mark.parametrize(("kv_tokens", "rate"), [(UNLIMITED, 3.0), (7000, 6.0)], ids=["free", "KV binds"])
def test_colocated_agrees_with_a_slow_oracle(chunk, kv_tokens, rate):
    """One worker, so dispatch does not matter; every step is taken by itself."""
    requests = some_requests(300, seed=5)
    requests = requests.only(requests.num_prompt_tokens < 5000)
    step_time = LinearStepTime(**BOTH)
    max_batch = 16
    table = tabulate(step_time, num_stages=1, max_batch=max_batch, max_tokens=8192)
    mixed = chunk and tabulate_mixed(step_time, num_stages=1, max_batch=max_batch, budget_tokens=chunk)
    fleet = ColocatedFleet(
        table=table, num_workers=1, kv_tokens=kv_tokens, mixed=mixed or None, batch_tokens=chunk or 1024
    )
    fast = simulate(fleet, requests, rate)

    arrival = requests.arrival / rate
    prompt, cached, output, _ = (column.tolist() for column in columns_of(requests))
    left = [p - c for p, c in zip(prompt, cached, strict=True)]
    waiting: list[int] = []
    holding: set[int] = set()
    got, first, last = [0] * len(prompt), [0.0] * len(prompt), [0.0] * len(prompt)
    running: list[int] = []
    now, free, next_arrival = 0.0, kv_tokens, 0
    while len(last) - last.count(0.0) < len(last):
        while next_arrival < len(prompt) and arrival[next_arrival] <= now:
            waiting.append(next_arrival)
            next_arrival += 1
        if not waiting and not running:
            now = arrival[next_arrival]
            continue
        budget = (chunk - len(running)) if chunk else 1024
        parts: list[tuple[int, int]] = []
        for i in waiting:
            used = sum(part for _, part in parts)
            if budget - used <= 0 or (not chunk and parts and used + left[i] > 1024):
                break
            if i not in holding:
                if prompt[i] + output[i] > free or len(running) + len(holding) >= max_batch:
                    break
                free -= prompt[i] + output[i]
                holding.add(i)
            part = min(left[i], budget - used) if chunk else left[i]
            parts.append((i, part))
            if part < left[i]:
                break
        pairs = sum(prefill_pairs(part, prompt[i] - left[i]) for i, part in parts)
        decoding = running if (chunk or not parts) else []
        now += step_time.step_s(
            StepWork(
                sum(part for _, part in parts),
                pairs,
                len(decoding),
                sum(prompt[i] + got[i] for i in decoding),
            )
        )
        for i in list(decoding):
            got[i] += 1
            if got[i] == output[i]:
                running.remove(i)
                last[i] = now
                free += prompt[i] + output[i]
        for i, part in parts:
            left[i] -= part
            if left[i]:
                continue
            waiting.remove(i)
            holding.remove(i)
            first[i], got[i] = now, 1
            if output[i] == 1:
                last[i] = now
                free += prompt[i] + output[i]
            else:
                running.append(i)
    tpot = (np.array(last) - np.array(first)) / np.maximum(1, np.array(output) - 1)
    np.testing.assert_allclose(fast.ttft_s, np.array(first) - arrival, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fast.tpot_s, tpot, rtol=1e-9, atol=1e-9)


def test_the_dispatch_rules_are_the_routers_own():
    rng = random.Random(3)
    for _ in range(400):
        count = rng.randint(2, 7)
        ledger, pool = Ledger(), Pool()
        window = rng.choice([None, 600])
        blocks, max_batch = rng.choice([900, 4000]), rng.choice([3, 50])
        for number in range(count):
            capacity = WorkerCapacity(
                num_blocks=blocks, max_batch_size=max_batch, max_model_len=10**6, kv_bytes_per_block=1
            )
            account = ledger.open(str(number), capacity, 1, window)
            pool.add(account)
            for leg in range(rng.randint(0, 4)):
                ahead, kv = rng.choice([0, 100, 200]), rng.choice([0, 50, 100])
                account.commit(f"{number}.{leg}", num_queued_tokens=ahead, num_blocks=kv, num_kv_tokens=kv)
        facts = RequestFacts(
            num_prompt_tokens=rng.choice([100, 350]), num_expected_output_tokens=rng.choice([10, 500])
        )
        draw = rng.getrandbits(48)
        columns = {name: ledger.column(name).copy() for name in TOLD}
        kv_tokens = ledger.column("num_kv_tokens").astype(float)
        free = blocks - ledger.column("num_reserved_blocks")
        tied = np.zeros(count, np.int64)

        def chosen(policy, slots, facts=facts, ledger=ledger, draw=draw):
            choice = choose(policy, Candidates(facts, ledger, slots, draw=draw))
            return -1 if choice is None else choice.slot

        prompt, total = facts.num_prompt_tokens, facts.num_prompt_tokens + facts.num_expected_output_tokens
        queued, legs, turns = (columns[name] for name in TOLD)
        room = slots_with_prefill_room(facts, ledger, pool)
        room_limit = UNLIMITED if window is None else window
        assert pick_prefill(queued, legs, turns, prompt, room_limit, draw, tied) == chosen(PToken(), room)
        slots = slots_with_room(facts, ledger, pool.slots)
        assert pick_decode(legs, kv_tokens, turns, free, total, max_batch, draw, tied) == chosen(
            SmallestBatch(), slots
        )
        assert pick_colocated(queued, legs, turns, prompt, draw, tied) == chosen(LMetric(), pool.slots)


def test_a_table_equals_the_model_it_was_made_from():
    step_time = LinearStepTime(**BOTH, num_stages=2)
    table = tabulate(step_time, num_stages=2, max_batch=64, max_tokens=10_000)
    assert max_prefill_error(table, step_time, 10_000) < 1e-12
    work = StepWork(num_prefill_tokens=777, num_prefill_pairs=prefill_pairs(777, 300))
    assert prefill_step_s(table.prefill, 777.0, work.num_prefill_pairs) == pytest.approx(
        step_time.step_s(work), rel=1e-12
    )
    assert prefill_cadence_s(table.prefill, 777.0, work.num_prefill_pairs) == pytest.approx(
        step_time.cadence_s(work), rel=1e-12
    )
    # 40 sequences on two stages: micro-batches of 20, half of the context each.
    in_one = step_time.step_s(StepWork(num_decodes=20, num_context_tokens=5000))
    assert table.alpha[40] + table.beta[40] * 10_000 == pytest.approx(in_one, rel=1e-12)


def test_a_run_of_steps_is_the_sum_of_its_steps():
    first_s, growth_s = 0.02, 3e-6
    summed = sum(first_s + growth_s * step for step in range(1000))
    assert run_s(first_s, growth_s, 1000.0) == pytest.approx(summed, rel=1e-12)
    for span_s in (1e-9, 0.02, 0.0200001, 3.7, summed):
        k = steps_until(first_s, growth_s, span_s)
        assert run_s(first_s, growth_s, float(k)) >= span_s
        assert k == 0 or run_s(first_s, growth_s, float(k - 1)) < span_s


def test_two_stages_of_decode_carry_a_micro_batch_each():
    """Stage by stage: with two micro-batches under way each stage is always busy, and a token takes the
    time of one micro-batch through both stages. The table's figure is that, not half of it."""
    step_time = LinearStepTime(**DECODE, num_stages=2)
    table = tabulate(step_time, num_stages=2, max_batch=32, max_tokens=64)
    work = StepWork(num_decodes=8, num_context_tokens=4000)
    stage_free_s, ready_s = [0.0, 0.0], [0.0, 0.0]
    for turn in range(200):
        group = turn % 2
        at_s = ready_s[group]
        for stage in (0, 1):
            at_s = max(at_s, stage_free_s[stage]) + step_time.cadence_s(work)
            stage_free_s[stage] = at_s
        ready_s[group] = at_s
    seconds_per_token = (ready_s[0] - step_time.step_s(work)) / 99
    assert seconds_per_token == pytest.approx(table.alpha[16] + table.beta[16] * 8000, rel=1e-9)


def test_a_request_that_fits_nowhere_never_ends_and_harms_nobody():
    requests = some_requests(200, seed=1)
    requests.num_prompt_tokens[17] = 50_000
    table = tabulate(LinearStepTime(**BOTH), num_stages=1, max_batch=8, max_tokens=8192)
    fleet = SplitFleet(
        prefill=table, num_prefill=1, decode=table, num_decode=1, links=Links.free(1, 1),
        decode_kv_tokens=20_000,
    )  # fmt: skip
    done = simulate(fleet, requests, 1.0)
    assert np.isinf(done.ttft_s[17])
    assert np.isfinite(np.delete(done.tpot_s, 17)).all()
