"""Stay or go in the core, and every decision's record."""

from __future__ import annotations

import json
import random

import pytest

from baton.contract.errors import ServingError
from baton.contract.lifecycle import Outcome, Way, WorkerRole
from baton.contract.messages import (
    BlocksStored,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    WorkerLoad,
)
from baton.contract.tokens import pack_token_ids
from baton.policy.explain import decide_again, story
from baton.step_time.base import prefill_pairs
from coordinator.metrics import Metrics

P, D, B = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH
BLOCK = 16
PROMPT = list(range(1000, 1161))  # 10 full blocks and one more token


def stored(token_ids, num_blocks):
    names = [hash((n, *token_ids[: n * BLOCK])) % 2**64 for n in range(num_blocks + 1)]
    return BlocksStored(
        block_hashes=names[1:], parent_hash=None, token_ids=pack_token_ids(token_ids[: num_blocks * BLOCK])
    )


def know_the_pace(bench, *, token_s=1e-3, handoff_s=0.01):
    """As if the fleet had served for a while: a token costs 1 ms, a step 1 ms, a hand-off 10 ms."""
    pace, rng = bench.core.pace, random.Random(1)
    for _ in range(100):
        tokens = rng.randint(10, 300)
        pace.prefilled(tokens, 0, token_s * tokens + 1e-9 * prefill_pairs(tokens))
        pace.handed_over(1000, handoff_s)
        for _ in range(8):
            pace.stepped(rng.randint(1, 8), 100, 0.001)
    assert pace.pace() is not None


@pytest.fixture
def fleet(make_bench):
    """1P1D that tell what they hold; d0 holds all of PROMPT that can be held."""
    bench = make_bench(keeps_records=True)
    bench.add("p0", P, has_kv_events=True)
    bench.add("d0", D, has_kv_events=True)
    bench.kv_events("d0", 0, stored(PROMPT, 10))
    return bench


def way_of(sink):
    placement = sink.placements[0]
    return placement.way, placement.way_reason


def test_a_held_prompt_is_computed_where_it_is_decoded(fleet):
    """
    1. d0 holds 160 of 161 tokens, p0 nothing: one leg at d0, that costs its queue 1 token
    2. it ends: said, counted, nothing moved, hits predicted and found, nothing held
    """
    know_the_pace(fleet)
    sink = fleet.submit("r", token_ids=PROMPT, max_tokens=2)
    assert fleet.take(StartPrefill) == []
    ((worker, leg),) = fleet.take(StartDecode)
    assert worker == "d0" and leg.kv_source is None
    assert fleet.worker("d0").account.num_queued_tokens == 1  # 161 - 160
    last = SequenceDelta(leg.handoff_id, [8, 9], "yy", "length", num_cached_tokens=160)
    fleet.perform(fleet.core.step(fleet.worker("d0"), StepOutputs(deltas=[last], load=WorkerLoad()), 0.1))
    assert way_of(sink) == (Way.STAYED, "computing the rest there costs less than a hand-off")
    (report,) = sink.reports
    assert (report.placement.predicted_hit_tokens, report.placement.hit_tokens, report.kv_bytes) == (
        160,
        160,
        0,
    )
    assert report.placement.prefill_worker == report.placement.decode_worker == "d0"
    metrics = Metrics()
    metrics.on_finished(report)
    counted = (
        'baton_ways_total{reason="computing the rest there costs less than a hand-off",way="stayed"} 1.0'
    )
    assert counted in metrics.render()[0].decode()
    fleet.assert_nothing_is_held()


def test_it_goes_while_the_pace_is_unknown(fleet):
    sink, _ = fleet.prefilled("r", token_ids=PROMPT)
    assert way_of(sink) == (Way.DISAGGREGATED, "the fleet's pace is not known yet")


def test_it_goes_where_the_prefill_worker_holds_as_much(fleet):
    know_the_pace(fleet)
    fleet.kv_events("p0", 0, stored(PROMPT, 10))
    sink, _ = fleet.prefilled("r", token_ids=PROMPT)
    assert way_of(sink) == (Way.DISAGGREGATED, "the decode worker holds no more of the prompt")


@pytest.mark.parametrize(
    ("num_running", "way", "reason"),
    [
        (2, Way.STAYED, "computing the rest there costs less than a hand-off"),  # 3 x 33 ms
        (8, Way.DISAGGREGATED, "a hand-off costs no more than computing the rest there"),  # 9 x 33 ms
    ],
    ids=["few", "many"],
)
def test_running_sequences_count(fleet, num_running, way, reason):
    """d0 holds 8 of 10 blocks: 33 ms for the request and for each running one, against 161 + 10 ms."""
    know_the_pace(fleet)
    fleet.worker("d0").account.observe(WorkerLoad(num_running=num_running))
    sink = fleet.submit("r", token_ids=[*PROMPT[:128], *range(33)])
    for worker, start in fleet.take(StartPrefill):
        fleet.finish_prefill(worker, start.handoff_id)
    for worker, start in fleet.take(StartDecode):
        fleet.step(worker, start.handoff_id, 1)
    assert way_of(sink) == (way, reason)


def test_without_hits_nobody_asks(make_bench):
    bench = make_bench()
    bench.add("p0", P)
    bench.add("d0", D)
    know_the_pace(bench)
    sink, _ = bench.prefilled("r")
    assert way_of(sink) == (Way.DISAGGREGATED, "what workers hold is not known")


def test_it_need_not_wait_for_a_window(make_bench):
    """p0's window is full and the next prompt waits; one that d0 holds does not have to."""
    bench = make_bench(keeps_records=True)
    bench.add("p0", P, has_kv_events=True, prefill_window_tokens=50)
    bench.add("d0", D, has_kv_events=True)
    bench.kv_events("d0", 0, stored(PROMPT, 10))
    know_the_pace(bench)
    bench.submit("first", num_prompt_tokens=50)
    assert len(bench.take(StartPrefill)) == 1
    sink = bench.submit("held", token_ids=PROMPT, max_tokens=2)
    ((worker, leg),) = bench.take(StartDecode)
    assert worker == "d0"
    bench.step("d0", leg.handoff_id, 1, 2, finish="length")
    assert way_of(sink)[0] is Way.STAYED
    bench.submit("waits", num_prompt_tokens=40)
    assert bench.take(StartPrefill) == [] and bench.core.num_queued == 1


def test_a_lost_stay_is_tried_again_elsewhere(fleet):
    know_the_pace(fleet)
    sink = fleet.submit("r", token_ids=PROMPT)
    ((worker, _),) = fleet.take(StartDecode)
    assert worker == "d0"
    fleet.add("d1", D)
    fleet.perform(fleet.core.worker_lost("d0", "silent", 0.0))
    ((_, prefill),) = fleet.take(StartPrefill)
    fleet.finish_prefill("p0", prefill.handoff_id)
    assert sink.token_ids == [100]
    assert sink.placements[0].way is Way.DISAGGREGATED


@pytest.mark.parametrize("policies", [("lmetric", "smallest-batch"), ("cache-aware", "power-of-two"),
                                      ("preble", "fewest-kv-tokens")], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("roles", ["pdd", "ppdd", "bb", "pdb"])
@pytest.mark.parametrize("seed", range(5))
def test_every_record_of_a_random_fleet_decides_again_the_same(make_bench, roles, seed, policies):
    """Hits, windows, full batches, lost workers and retries; the log's JSON is what is replayed."""
    rng = random.Random(seed)
    bench = make_bench(keeps_records=True, policies=policies)
    records: list = []
    finish = bench.perform

    def keep(actions):
        for action in actions:
            records.extend(getattr(action, "records", ()))
        finish(actions)

    bench.perform = keep
    role_of = {f"{letter}{i}": {"p": P, "d": D, "b": B}[letter] for i, letter in enumerate(roles)}
    events = dict.fromkeys(role_of, 0)

    def join(name):
        bench.add(name, role_of[name], num_blocks=40, max_batch_size=4, has_kv_events=True,
                  prefill_window_tokens=rng.choice([None, 200]))  # fmt: skip
        events[name] = 0

    for name in role_of:
        join(name)
    know_the_pace(bench)
    prompts = [[rng.randrange(9999) for _ in range(rng.randint(1, 160))] for _ in range(6)]
    live: list = []
    for number in range(250):
        choice = rng.random()
        if choice < 0.4:
            try:
                bench.submit(f"r{number}", token_ids=rng.choice(prompts), max_tokens=rng.randint(1, 6))
            except ServingError:
                pass
        elif choice < 0.55:
            name, prompt = rng.choice(list(role_of)), rng.choice(prompts)
            bench.kv_events(name, events[name], stored(prompt, rng.randint(0, (len(prompt) - 1) // BLOCK)))
            events[name] += 1
        elif choice < 0.9 and live:
            bench.answer_one(rng, live)
        elif choice < 0.94 and live:
            worker, message = rng.choice(live)
            if bench.worker(worker) is not None:
                bench.fail(worker, message.handoff_id, "engine_failed")
        elif choice < 0.97:
            name = rng.choice(list(role_of))
            bench.perform(bench.core.worker_lost(name, "chaos", bench.now_s))
            join(name)
        else:
            bench.now_s += rng.choice([0.1, 25.0])
            bench.perform(bench.core.tick(bench.now_s))
        live += bench.take(StartPrefill) + bench.take(StartDecode)
    bench.perform(bench.core.abort_all("end of the test", bench.now_s))
    bench.assert_nothing_is_held()
    assert len(records) > 30
    for recorded in json.loads(json.dumps(records)):
        assert decide_again(recorded) == []
        assert recorded["way"] in story(recorded)
    outcomes = {report.outcome for sink in bench.sinks.values() for report in sink.reports}
    assert Outcome.COMPLETED in outcomes
