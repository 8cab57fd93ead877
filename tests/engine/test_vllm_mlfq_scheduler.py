"""Our scheduler on vLLM's real scheduler classes, without an engine: a fake runner gives the tokens."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def only(demo_model: Path) -> Any:
    from tests.engine import scheduler_only

    return scheduler_only


STEP_S = 0.02


def scheduler_class(name: str = "MlfqScheduler") -> type:
    from baton.engine.vllm import mlfq_scheduler

    class OnSteps(getattr(mlfq_scheduler, name)):  # type: ignore[misc]
        def _now_s(self) -> float:
            step: int = self.current_step
            return step * STEP_S

    return OnSteps


def stock_class() -> type:
    from vllm.v1.core.sched.scheduler import Scheduler

    cls: type = Scheduler
    return cls


def bimodal(seed: int, num: int, load: float, batch: int = 4) -> list[tuple[int, int, int]]:
    """(arrival step, prompt tokens, output tokens): 88 % of 6-20 tokens, 12 % of 150-250."""
    randomness = random.Random(seed)
    sizes = [
        randomness.randint(6, 20) if randomness.random() < 0.88 else randomness.randint(150, 250)
        for _ in range(num)
    ]
    clock, trace = 0.0, []
    for size in sizes:
        clock += randomness.expovariate(load * batch / (0.88 * 13 + 0.12 * 200))
        trace.append((int(clock), randomness.randint(16, 40), size))
    return trace


def jobs(only: Any, trace: list[tuple[int, int, int]]) -> list[Any]:
    return [(at, only.new_request(f"r{i}", prompt, size)) for i, (at, prompt, size) in enumerate(trace)]


def mean_jct(played: Any, trace: list[tuple[int, int, int]]) -> float:
    return float(statistics.mean(played.finished[f"r{i}"] - at for i, (at, _, _) in enumerate(trace)))


def check_complete(
    only: Any, scheduler: Any, played: Any, trace: list[tuple[int, int, int]], num_blocks: int
):
    assert played.num_tokens == {f"r{i}": size for i, (_, _, size) in enumerate(trace)}
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_blocks, only.describe(scheduler)
    assert not scheduler._step_policy._key_by_job


def test_short_jobs_overtake_long_ones_and_every_token_arrives(only: Any, demo_model: Path):
    trace = bimodal(seed=1, num=120, load=1.3)
    config = only.engine_config(str(demo_model), max_num_seqs=4)
    stock = only.make_scheduler(stock_class(), config, num_blocks=500)
    before = only.play(stock, jobs(only, trace))
    ours = only.make_scheduler(
        scheduler_class(), only.engine_config(str(demo_model)), num_blocks=500, max_batch_size=4
    )
    after = only.play(ours, jobs(only, trace))
    check_complete(only, ours, after, trace, 500)
    assert after.max_batch == 4
    assert mean_jct(after, trace) * 1.4 < mean_jct(before, trace)
    assert after.num_steps <= 1.1 * before.num_steps
    assert after.max_preemptions == 0


def test_asynchronous_scheduling_with_two_steps_in_flight(only: Any, demo_model: Path):
    trace = bimodal(seed=2, num=120, load=1.3)
    config = only.engine_config(str(demo_model))
    config.scheduler_config.async_scheduling = True
    ours = only.make_scheduler(
        scheduler_class("AsyncMlfqScheduler"), config, num_blocks=500, max_batch_size=4
    )
    played = only.play(ours, jobs(only, trace), depth=2)
    check_complete(only, ours, played, trace, 500)
    assert played.max_batch == 4


def test_asynchronous_scheduling_where_memory_is_short(only: Any, demo_model: Path):
    trace = bimodal(seed=2, num=80, load=1.3)
    config = only.engine_config(str(demo_model), max_model_len=512)
    config.scheduler_config.async_scheduling = True
    ours = only.make_scheduler(scheduler_class("AsyncMlfqScheduler"), config, num_blocks=20, max_batch_size=4)
    played = only.play(ours, jobs(only, trace), depth=2)
    check_complete(only, ours, played, trace, 20)


@pytest.mark.parametrize("is_swapping", [False, True], ids=["recompute", "swap"])
def test_the_batch_stays_full_with_more_requests_than_residents(
    only: Any, demo_model: Path, is_swapping: bool
):
    """Who finds no seat among the residents takes no place in the batch either."""
    config = only.engine_config(
        str(demo_model), max_num_seqs=16, kv_transfer_config=only.host_swap() if is_swapping else None
    )
    ours = only.make_scheduler(scheduler_class(), config, num_blocks=500, max_batch_size=4)
    played = only.play(ours, jobs(only, [(0, 24, 30)] * 40))
    check_complete(only, ours, played, [(0, 24, 30)] * 40, 500)
    assert {len(batch) for batch in played.batches[:-4]} == {4}


def test_a_prefill_worker_without_a_seat_goes_on_with_what_it_has(only: Any, demo_model: Path):
    config = only.engine_config(str(demo_model), max_num_seqs=1, max_num_batched_tokens=128)
    ours = only.make_scheduler(scheduler_class(), config, num_blocks=500, policy="shortest-prefill")
    trace = [(0, 900, 1), (2, 40, 1)]
    played = only.play(ours, jobs(only, trace))
    check_complete(only, ours, played, trace, 500)
    assert all(played.batches)


def test_when_everything_fits_the_batches_are_stock(only: Any, demo_model: Path):
    trace = bimodal(seed=3, num=40, load=0.15)
    stock = only.make_scheduler(stock_class(), only.engine_config(str(demo_model)), num_blocks=500)
    before = only.play(stock, jobs(only, trace))
    ours = only.make_scheduler(
        scheduler_class(), only.engine_config(str(demo_model)), num_blocks=500, max_batch_size=64
    )
    after = only.play(ours, jobs(only, trace))
    assert after.batches == before.batches


def test_swapped_kv_is_not_computed_again_and_recomputed_kv_is(only: Any, demo_model: Path):
    """20 blocks for four places: what is evicted comes back from the host."""
    trace = bimodal(seed=4, num=120, load=1.3)
    played = {}
    for is_swapping in (False, True):
        config = only.engine_config(
            str(demo_model),
            max_model_len=512,
            kv_transfer_config=only.host_swap() if is_swapping else None,
        )
        ours = only.make_scheduler(scheduler_class(), config, num_blocks=20, max_batch_size=4)
        played[is_swapping] = only.play(ours, jobs(only, trace))
        check_complete(only, ours, played[is_swapping], trace, 20)
        assert played[is_swapping].max_batch == 4
        assert (ours._num_recomputed_tokens == 0) == is_swapping
        if is_swapping:
            counters = ours._host.counters()
            assert counters["num_swaps_out"] > 10
            assert counters["num_host_blocks"] == 0
            ours._last_counters = None  # as if something had changed since the last step
            stats = ours.make_stats()
            assert stats.num_kv_fetch_reqs_by_stage["baton_num_swaps_out"] == counters["num_swaps_out"]
    assert mean_jct(played[True], trace) < mean_jct(played[False], trace)


def test_starving_requests_do_not_swap_each_other_out_for_ever(only: Any, demo_model: Path):
    """Twelve long ones, of which memory holds two, and short ones that want room in between. An answer of
    220 tokens leaves by our choice at most 2 + log2(220 / 32), that is 4 times."""
    longs = [(0, 32, 220)] * 12
    trace = longs + [(6 * (i + 1), 24, 8) for i in range(60)]
    config = only.engine_config(str(demo_model), max_model_len=512, kv_transfer_config=only.host_swap())
    ours = only.make_scheduler(scheduler_class(), config, num_blocks=20, max_batch_size=4)
    num_chosen: dict[str, int] = {}
    choose = ours._swap_rule.choose

    class Rule:
        def choose(self, *arguments: Any, **named: Any) -> Any:
            choice = choose(*arguments, **named)
            for job_id in choice.evict:
                num_chosen[job_id] = num_chosen.get(job_id, 0) + 1
            return choice

        reserve_blocks = ours._swap_rule.reserve_blocks
        may_move = ours._swap_rule.may_move

    ours._swap_rule = Rule()
    played = only.play(ours, jobs(only, trace))
    check_complete(only, ours, played, trace, 20)
    assert max(num_chosen.values()) <= 4
    assert ours._host.num_swaps_out <= 3 * len(trace)
    assert ours._num_recomputed_tokens == 0
    assert not ours._stays_until


def test_nobody_is_parked_longer_than_the_bound(only: Any, demo_model: Path):
    """Starvation 3 s = 150 steps of 20 ms; boosts of 8 tokens on half of 4 places."""
    trace = bimodal(seed=5, num=150, load=1.3)
    ours = only.make_scheduler(
        scheduler_class(), only.engine_config(str(demo_model)), num_blocks=800, max_batch_size=4
    )
    num_present = 0

    def count(step: int) -> None:
        nonlocal num_present
        num_present = max(num_present, len(ours.requests))

    played = only.play(ours, jobs(only, trace), on_step=count)
    assert played.max_gap <= 150 + 1 + 8 * -(-num_present // 2)


def test_prefix_cached_and_chunked_prompts(only: Any, demo_model: Path):
    """Prompts longer than a step, half of each shared."""
    config = only.engine_config(str(demo_model), max_num_batched_tokens=128, max_num_seqs=32)
    ours = only.make_scheduler(scheduler_class(), config, num_blocks=300, max_batch_size=4)
    requests = []
    for i in range(20):
        request = only.new_request(f"r{i}", 600, 10 if i % 4 else 100)
        requests.append((i * 3, request))
    played = only.play(ours, requests)
    assert played.num_tokens == {f"r{i}": 10 if i % 4 else 100 for i in range(20)}
    assert ours.kv_cache_manager.block_pool.get_num_free_blocks() == 300


def test_aborted_requests_leave_nothing_behind(only: Any, demo_model: Path):
    from vllm.v1.request import RequestStatus

    trace = bimodal(seed=6, num=60, load=1.3)
    config = only.engine_config(str(demo_model), max_model_len=512, kv_transfer_config=only.host_swap())
    ours = only.make_scheduler(scheduler_class(), config, num_blocks=20, max_batch_size=4)
    randomness = random.Random(7)
    doomed: list[str] = []

    def abort_one(step: int) -> None:
        if step % 10 == 0 and ours.requests:
            doomed.append(randomness.choice(sorted(ours.requests)))

    def play() -> Any:
        stock_update = ours.update_from_output

        def update(*arguments: Any) -> Any:
            result = stock_update(*arguments)
            while doomed:
                ours.finish_requests(doomed.pop(), RequestStatus.FINISHED_ABORTED)
            return result

        ours.update_from_output = update
        return only.play(ours, jobs(only, trace), on_step=abort_one)

    played = play()
    assert len(played.finished) < 60
    assert ours.kv_cache_manager.block_pool.get_num_free_blocks() == 20
    assert not ours._step_policy._key_by_job
    assert ours._host.counters()["num_host_blocks"] == 0


def test_priorities_and_keys_arrive(only: Any, demo_model: Path):
    """A tenant with 30 requests and one with 2: the second is not starved. Priorities go first."""
    ours = only.make_scheduler(
        scheduler_class(), only.engine_config(str(demo_model)), num_blocks=500, max_batch_size=2
    )
    requests = [
        (0, only.new_request(f"greedy{i}", 10, 40, baton_scheduler={"key": "greedy"})) for i in range(30)
    ]
    requests += [
        (1, only.new_request("modest", 10, 40, baton_scheduler={"key": "modest"})),
        (1, only.new_request("urgent", 10, 40, baton_scheduler={"key": "greedy", "priority": -1})),
    ]
    played = only.play(ours, requests)
    assert played.finished["modest"] < 100
    assert played.finished["urgent"] < 100
    assert sorted(played.finished.values())[2] > 100


def test_shortest_prefill_first_with_few_open_prompts(only: Any, demo_model: Path):
    config = only.engine_config(str(demo_model), max_num_batched_tokens=256)
    ours = only.make_scheduler(scheduler_class(), config, num_blocks=500, policy="shortest-prefill")
    requests = [(0, only.new_request(f"long{i}", 900, 1)) for i in range(6)]
    requests += [(2, only.new_request(f"short{i}", 40, 1)) for i in range(4)]
    max_open = 0

    def count(step: int) -> None:
        nonlocal max_open
        max_open = max(max_open, sum(r.is_prefill_chunk for r in ours.running))

    played = only.play(ours, requests, on_step=count)
    shorts = [played.finished[f"short{i}"] for i in range(4)]
    longs = sorted(played.finished[f"long{i}"] for i in range(6))
    assert max(shorts) <= 5 and longs[1] > max(shorts)
    assert max_open <= 3


def test_schedule_takes_less_than_a_millisecond_with_256_residents(only: Any, demo_model: Path):
    config = only.engine_config(str(demo_model))
    ours = only.make_scheduler(scheduler_class(), config, num_blocks=2000, max_batch_size=64)
    costs_s: list[float] = []
    stock_schedule = ours.schedule

    def timed() -> Any:
        started_s = time.process_time()
        output = stock_schedule()
        if len(ours.running) >= 250:
            costs_s.append(time.process_time() - started_s)
        return output

    ours.schedule = timed
    only.play(ours, [(0, only.new_request(f"r{i}", 8, 30)) for i in range(256)])
    # Even CPU time grows with what others do to the caches: a busy machine makes steps slower, none faster.
    assert statistics.quantiles(costs_s, n=10)[0] < 0.001


def test_drift_is_noticed_and_the_installed_version_is_known():
    from baton.engine.vllm import drift

    assert drift.installed_drift() == []

    class Scheduler:
        def __init__(self) -> None:
            self.running: list[Any] = []

        def schedule(self) -> None: ...

    problems = drift.drift(Scheduler, Scheduler)
    assert any("Scheduler.schedule takes (self), expected" in p for p in problems)
    assert any("the source of Scheduler.schedule has changed" in p for p in problems)
    assert "Scheduler._preempt_request is gone" in problems
    assert "Scheduler.waiting is gone" in problems
