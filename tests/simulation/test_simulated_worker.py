"""The simulated worker against a slow, obvious one, and its life of legs, leases and blocks."""

from __future__ import annotations

import random

import pytest

from baton.contract.messages import BlocksRemoved, BlocksStored
from baton.contract.tokens import pack_token_ids
from baton.policy.kv_feed import KvFeeds
from baton.policy.kv_index import KvIndex
from baton.simulation import SimulatedWorker, SimulatedWorkerSettings
from baton.step_time import LinearStepTime, StepWork
from tests.simulation.naive_worker import NaiveLeg, NaiveWorker

STEP_TIME = LinearStepTime(
    base_s=0.005,
    per_prefill_token_s=2e-5,
    per_prefill_pair_s=1e-9,
    per_decode_s=1e-4,
    per_context_token_s=1e-6,
)


def worker(**settings) -> SimulatedWorker:
    defaults = {"num_blocks": 64, "block_size_tokens": 4, "max_batch_size": 8, "max_num_batched_tokens": 32}
    return SimulatedWorker(SimulatedWorkerSettings(**(defaults | settings)), STEP_TIME)


def num_blocks_accounted(w: SimulatedWorker) -> int:
    """Queue, runs in use (each once), and what only one leg or hold has."""
    in_use: dict[int, int] = {}
    own = 0
    for leg in w.places.legs.values():
        own += leg.num_own_blocks
        in_use |= {id(run): run.num_blocks for run in leg.runs}
    for runs, num_own in w.places.holds:
        own += num_own
        in_use |= {id(run): run.num_blocks for run in runs}
    queued = w.cache.runs_in_queue
    assert sum(run.num_blocks for run in queued) == w.cache.num_free_blocks
    assert all(not run.num_users and run.num_blocks > 0 for run in queued)
    assert not in_use.keys() & {id(run) for run in queued}
    return w.cache.num_free_blocks + own + sum(in_use.values())


def run_dry(w: SimulatedWorker, now_s: float = 0.0, max_num_steps: int = 1):
    log = []
    while (step := w.begin_step(now_s, max_num_steps)) is not None:
        now_s = step.end_s
        result = w.end_step()
        log += [(leg.leg_id, leg.num_cached_tokens, round(now_s, 9)) for leg in result.finished]
        log += [(leg.leg_id, leg.num_cached_tokens, round(now_s, 9)) for leg in result.finished_prefills]
    return log


def chain(names: list[int]) -> list[int]:
    """Each hash names its block and all before it."""
    hashes, parent = [], 0
    for name in names:
        parent = hash((parent, name)) & 0xFFFF_FFFF
        hashes.append(parent)
    return hashes


def random_legs(seed: int, *, num_legs: int = 40, block: int = 4):
    draw = random.Random(seed)
    legs = []
    for n in range(num_legs):
        num_prompt = draw.randint(1, 60)
        branch = draw.randint(0, 2)
        hashes = chain([branch + (draw.random() < 0.1) * 7 for _ in range(num_prompt // block)])
        legs.append((f"r{n}", hashes, num_prompt, draw.choice([1, 1, 3, 20, 60])))
    return legs


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("max_num_steps", [1, 1000])
def test_equals_the_naive_worker(seed: int, max_num_steps: int):
    """Hits, preemptions and the time of every finish, with legs joining while others run; a small cache
    so that blocks are evicted and legs preempted."""
    num_blocks = random.Random(seed).choice([31, 40, 64, 500])
    w = worker(num_blocks=num_blocks)
    naive = NaiveWorker(num_blocks, 4, 8, 32, STEP_TIME)
    log = []
    now_s = 0.0
    legs = random_legs(seed)
    while legs:
        batch, legs = legs[:5], legs[5:]
        for leg_id, hashes, num_prompt, num_output in batch:
            w.add_decode(leg_id, num_prompt, num_output, hashes, now_s, is_kv_on_its_way=False)
            naive.add(NaiveLeg(leg_id, hashes, num_prompt, num_output))
        # A few steps, then the next ones join.
        left = 7
        while left and (step := w.begin_step(now_s, min(left, max_num_steps))) is not None:
            left -= step.num_steps
            now_s = step.end_s
            result = w.end_step()
            assert num_blocks_accounted(w) == num_blocks
            log += [(leg.leg_id, leg.num_cached_tokens, round(now_s, 9)) for leg in result.finished]
        for _ in range(7):
            if not naive.step():
                break
        assert now_s == pytest.approx(naive.now_s)
    log += run_dry(w, now_s, max_num_steps)
    while naive.step():
        pass
    log, expected = sorted(log), sorted(naive.log)
    assert [entry[:2] for entry in log] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in log] == pytest.approx([entry[2] for entry in expected])
    assert w.cache.num_free_blocks == num_blocks
    assert [run.name for run in w.cache.runs_in_queue if run.name is not None] == [
        block.name for block in naive.queue if block.name is not None
    ]


@pytest.mark.parametrize("seed", range(30))
def test_runs_of_blocks_are_the_same_as_blocks(seed: int):
    """Four blocks per hash lose, keep and find the same tokens as single blocks, where prompts agree in
    whole hashes. (Not the same: of an equal prompt that ends with a block, the last block is computed
    again, and single blocks get a newer copy of it.)"""
    draw = random.Random(seed)
    coarse, fine = worker(num_blocks=40, blocks_per_hash=4), worker(num_blocks=40)
    for n in range(60):
        num_prompt = 4 * draw.randint(0, 25) + draw.randint(1, 3)
        parts = chain([draw.randint(0, 1) for _ in range(-(-num_prompt // 16))])
        # The last hash may name fewer blocks; then nobody else's longer prompt has it.
        if num_prompt % 16:
            parts[-1] = hash((parts[-1], num_prompt)) & 0xFFFF_FFFF
        blocks = [hash((part, i)) & 0xFFFF_FFFF for part in parts for i in range(4)][: num_prompt // 4]
        logs = []
        for w, hashes in ((coarse, parts), (fine, blocks)):
            w.add_decode(f"r{n}", num_prompt, 9, hashes, 0.0, is_kv_on_its_way=False)
            logs.append(run_dry(w))
        assert logs[0] == logs[1]


def test_many_decode_steps_are_one():
    w, single = worker(num_blocks=500), worker(num_blocks=500)
    for each in (w, single):
        each.add_decode("a", 5, 40, [], 0.0, is_kv_on_its_way=False)
        each.add_decode("b", 9, 25, [], 0.0, is_kv_on_its_way=False)
    many, one = run_dry(w, max_num_steps=10_000), run_dry(single)
    assert [entry[0] for entry in many] == ["b", "a"]
    assert [entry[2] for entry in many] == pytest.approx([entry[2] for entry in one])


@pytest.mark.parametrize("num_outputs", [1, 2, 90])
@pytest.mark.parametrize("per_context_token_s", [0.0, 1e-4])
def test_a_row_of_steps_knows_when_each_ends(num_outputs: int, per_context_token_s: float):
    pace = LinearStepTime(base_s=0.01, per_decode_s=1e-3, per_context_token_s=per_context_token_s)
    rows, single = (SimulatedWorker(worker(num_blocks=500).settings, pace) for _ in range(2))
    now_s = 0.0
    for each in (rows, single):
        each.add_decode("a", 5, num_outputs + 1, [], 0.0, is_kv_on_its_way=False)
        each.add_decode("b", 9, num_outputs + 1, [], 0.0, is_kv_on_its_way=False)
        first = each.begin_step(0.0)
        assert first is not None
        now_s = first.end_s
        each.end_step()
    row = rows.begin_step(now_s, 1000)
    assert row is not None and row.num_steps == num_outputs
    assert row.num_ended(now_s) == 0
    for number in range(1, num_outputs + 1):
        step = single.begin_step(now_s)
        assert step is not None
        now_s = step.end_s
        single.end_step()
        assert row.step_end_s(number) == pytest.approx(now_s, abs=1e-9)
        assert (row.num_ended(now_s - 1e-6), row.num_ended(now_s + 1e-6)) == (number - 1, number)


def test_cut_ends_with_the_step_in_progress():
    w = worker(num_blocks=500)
    w.add_decode("a", 4, 101, [], 0.0, is_kv_on_its_way=False)
    first = w.begin_step(0.0)
    assert first is not None
    w.end_step()
    plan = w.begin_step(1.0, 1000)
    assert plan is not None and plan.num_steps == 100
    one_s = STEP_TIME.step_s(StepWork(0, 0.0, 1, 5))
    two_s = one_s + STEP_TIME.step_s(StepWork(0, 0.0, 1, 6))
    assert w.cut(1.0 + one_s + 1e-6) == pytest.approx(1.0 + two_s)
    assert w.end_step().tokens == [("a", 2)]
    leg = w.leg("a")
    assert leg is not None and leg.num_outputs_done == 3


def test_prompts_come_in_chunks_and_report_progress():
    w = worker()
    w.add_prefill("a", 50, [], 0.0, keep_kv=False)
    done = []
    while w.begin_step(0.0) is not None:
        result = w.end_step()
        done.append((result.num_prefill_tokens, [leg.leg_id for leg in result.finished_prefills]))
    assert done == [(32, []), (18, ["a"])]
    assert w.load().num_prefill_tokens_done == 50


def test_kv_of_a_finished_prefill_is_kept_until_it_is_released():
    w = worker(num_blocks=10)
    w.add_prefill("a", 8, [1, 2], 0.0, keep_kv=True)
    w.add_prefill("b", 8, [3, 4], 0.0, keep_kv=False)
    w.begin_step(0.0)
    result = w.end_step()
    assert [leg.num_held_blocks for leg in result.finished_prefills] == [2, 0]
    assert (len(w.places.holds), w.cache.num_free_blocks) == (1, 8)
    assert w.places.release("a") and not w.places.release("a")
    assert (len(w.places.holds), w.cache.num_free_blocks) == (0, 10)


def test_blocks_that_somebody_may_still_write_to_outlive_their_leg():
    """
    1. a leg waits for KV; nothing comes, and a late write may: it starts over in other blocks
    2. another one is stopped: its blocks stay too
    3. released, they are free
    """
    w = worker(num_blocks=10)
    for name in ("a", "b"):
        w.add_decode(name, 8, 4, [], 0.0, is_kv_on_its_way=True)
    w.begin_step(0.0)
    assert [fetch.leg_id for fetch in w.places.take_fetches()] == ["a", "b"]
    w.places.set_aside("a")
    assert w.end_early("b", keep_blocks=True)
    assert w.begin_step(0.0) is not None
    assert [*w.end_step().tokens] == [("a", 1)]
    assert (len(w.places.holds), w.cache.num_free_blocks) == (2, 10 - 2 - 2 - 2)
    assert w.places.release("a") and w.places.release("b")
    w.end_early("a")
    assert w.cache.num_free_blocks == 10


def test_promised_blocks_take_half_of_the_pool_and_the_line_for_them_holds_up_nobody_else():
    """
    1. streams of 8, 12 and 4 tokens want 2, 3 and 1 of 5 credits in 10 blocks: the third has to wait
    2. so does nobody whose KV is not streamed
    3. the first is here: its credits go to the third; a fourth that is stopped was never in the way
    """
    w = worker(num_blocks=10)
    for name, num_tokens in (("a", 8), ("b", 12), ("c", 4), ("d", 4)):
        w.add_decode(name, num_tokens, 4, [], 0.0, is_kv_on_its_way=True, is_streamed=True)
    w.add_decode("here", 4, 4, [], 0.0, is_kv_on_its_way=False)
    assert w.begin_step(0.0) is not None
    assert [fetch.leg_id for fetch in w.places.take_fetches()] == ["a", "b"]
    assert w.end_step().tokens == [("here", 1)]
    assert w.load().num_waiting == 4
    w.places.kv_arrived("a")
    w.end_early("d")
    w.begin_step(0.0)
    assert [fetch.leg_id for fetch in w.places.take_fetches()] == ["c"]


def test_kv_from_elsewhere_reserves_first_and_decodes_when_it_is_there():
    w = worker(num_blocks=10)
    w.add_decode("a", 9, 3, [1, 2], 0.0, is_kv_on_its_way=True)
    w.add_decode("b", 25, 3, [], 0.0, is_kv_on_its_way=True)
    assert w.begin_step(0.0) is None
    assert w.places.take_fetches() == [("a", 9, False), ("b", 25, False)]
    assert w.cache.num_free_blocks == 0
    w.places.kv_arrived("a")
    step = w.begin_step(1.0)
    assert step is not None
    assert step.work == StepWork(0, 0.0, 1, 9)  # 8 tokens came, the ninth is computed here
    assert w.end_step().tokens == [("a", 1)]
    w.places.kv_lost("b")
    step = w.begin_step(2.0)
    assert step is not None and step.work.num_prefill_tokens == 25


def test_a_second_decode_of_the_same_prompt_fetches_less():
    w = worker()
    for name, num_missing in (("a", 13), ("b", 1)):
        w.add_decode(name, 13, 2, [1, 2, 3], 0.0, is_kv_on_its_way=True)
        w.begin_step(0.0)
        assert w.places.take_fetches() == [(name, num_missing, False)]
        w.places.kv_arrived(name)
        run_dry(w)


def test_ending_early_frees_everything_at_any_time():
    w = worker(num_blocks=20)
    w.add_decode("runs", 9, 30, [1, 2], 0.0, is_kv_on_its_way=False)
    w.add_decode("fetches", 9, 30, [1, 2], 0.0, is_kv_on_its_way=True)
    w.begin_step(0.0)
    w.add_decode("waits", 9, 30, [1, 2], 0.0, is_kv_on_its_way=False)
    for leg_id in ("runs", "fetches", "waits"):
        assert w.end_early(leg_id)
    assert not w.end_early("runs")
    assert w.end_step().tokens == []
    assert w.cache.num_free_blocks == 20 and w.num_legs == 0


@pytest.mark.parametrize("seed", range(20))
def test_predicted_hits_are_the_hits(seed: int):
    """Events applied at once: what the index says of a prompt is what the worker then finds (A3)."""
    draw = random.Random(seed)
    size = 4
    w = worker(num_blocks=30)
    index = KvIndex(size, seed=1)
    feeds = KvFeeds(index)
    feeds.joined(0, "boot")
    num_batches = num_hits = 0
    for n in range(150):
        tokens = [draw.randint(0, 1)] * draw.randint(1, 8) + [
            draw.randint(0, 2) for _ in range(draw.randint(1, 40))
        ]
        packed = pack_token_ids(tokens)
        hashes = chain(
            [hash(tuple(tokens[i : i + size])) for i in range(0, len(tokens) // size * size, size)]
        )
        predicted = index.blocks_by_slot(index.match(index.prompt(packed)), 1)[0] * size
        w.add_prefill(f"r{n}", len(tokens), hashes, 0.0, keep_kv=False, packed=packed)
        while w.begin_step(0.0) is not None:
            result = w.end_step()
            feeds.received(0, "boot", num_batches, result.events)
            num_batches += 1
            for leg in result.finished_prefills:
                assert leg.num_cached_tokens == predicted
                num_hits += predicted > 0
    assert num_hits > 20
    assert index.counters.num_unknown_parents == index.counters.num_unknown_removals == 0


def test_events_are_announced_once_and_in_chains():
    w = worker(num_blocks=4)
    tokens = pack_token_ids(list(range(12)))
    w.add_prefill("a", 12, [1, 2, 3], 0.0, keep_kv=False, packed=tokens)
    w.begin_step(0.0)
    (stored,) = w.end_step().events
    assert stored == BlocksStored(block_hashes=[1, 2, 3], parent_hash=None, token_ids=tokens)
    # The last block of an equal prompt is computed again, for its logits; nothing new is announced.
    w.add_prefill("b", 12, [1, 2, 3], 0.0, keep_kv=False, packed=tokens)
    w.begin_step(0.0)
    assert w.end_step().events == ()
    w.add_prefill("c", 12, [1, 5, 6], 0.0, keep_kv=False, packed=tokens)
    w.begin_step(0.0)
    removed, stored = w.end_step().events
    assert isinstance(removed, BlocksRemoved) and sorted(removed.block_hashes) == [3]
    assert stored == BlocksStored(block_hashes=[5, 6], parent_hash=1, token_ids=tokens[16:])


@pytest.mark.parametrize("name", ["num_blocks", "max_batch_size", "max_num_batched_tokens"])
def test_settings_are_checked(name: str):
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        worker(**{name: 0})
