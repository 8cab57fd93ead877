"""Orders, levels, boosts: policies as scenarios, without an engine."""

from __future__ import annotations

import math
import random
import time

import pytest

from baton.scheduling import (
    NAMES,
    FairShare,
    FirstIteration,
    JobFacts,
    Mlfq,
    ShortestPrefill,
    Srpt,
    StepPolicy,
    by_name,
)
from baton.step_time import LinearStepTime


def job(job_id: str, **facts) -> JobFacts:
    return JobFacts(job_id=job_id, **({"arrival_s": 0.0} | facts))


def serve(policy: StepPolicy, job_id: str, num_tokens: int, now_s: float = 0.0) -> None:
    for _ in range(num_tokens):
        policy.charge(job_id, num_output_tokens=1, now_s=now_s)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_orders_what_it_is_given_and_forgets_what_left(name: str):
    policy = by_name(name)
    for turn in range(5):
        policy.add(job(f"j{turn}", num_uncached_tokens=10, num_output_tokens=20), now_s=0.0)
    policy.charge("j0", num_prefill_tokens=10, num_output_tokens=1, now_s=1.0)
    policy.remove("j3")
    policy.remove("j3")
    order = policy.order(["j0", "j1", "j2", "j4"], now_s=1.0)
    assert sorted(order) == ["j0", "j1", "j2", "j4"]
    waits = policy.waits(order, num_places=2, step_s=0.02, now_s=1.0)
    assert waits[:2] == [0.0, 0.0] and min(waits[2:]) >= 1.0
    policy.add(job("j3", num_uncached_tokens=1, num_output_tokens=1), now_s=2.0)
    with pytest.raises(ValueError, match="already here"):
        policy.add(job("j3", num_output_tokens=1), now_s=2.0)


def test_names_and_parameters():
    assert by_name("skip-join-mlfq:16,1.5,4").name == "skip-join-mlfq"
    with pytest.raises(ValueError, match="there are fcfs, mlfq"):
        by_name("lifo")
    with pytest.raises(ValueError, match="takes 0 parameters"):
        by_name("fcfs:1")
    with pytest.raises(ValueError, match="is no int"):
        by_name("mlfq:many")
    with pytest.raises(ValueError, match="at least 1 token"):
        by_name("mlfq:0")


def test_fcfs_keeps_the_order_of_arrival_whatever_was_served():
    policy = by_name("fcfs")
    policy.add(job("a"), 0.0)
    policy.add(job("b"), 0.0)
    serve(policy, "a", 100)
    assert policy.order({"b", "a"}, 1.0) == ["a", "b"]


def test_levels_sink_with_carry_over():
    """Quanta 4, 8, 16, ...: 4 tokens end level 0, 12 end level 1."""
    policy = Mlfq(base_quantum_tokens=4)
    policy.add(job("a"), 0.0)
    serve(policy, "a", 3)
    assert policy.level("a") == 0
    policy.charge("a", num_output_tokens=3, now_s=0.0)  # 6 = 4 + 2 carried over
    assert policy.level("a") == 1
    serve(policy, "a", 5)
    assert policy.level("a") == 1  # 2 + 5 < 8
    serve(policy, "a", 1)
    assert policy.level("a") == 2
    policy.charge("a", num_output_tokens=16 + 32 + 1, now_s=0.0)
    assert policy.level("a") == 4


def test_inside_a_level_who_entered_it_first_goes_on_until_it_sinks():
    policy = Mlfq(base_quantum_tokens=4)
    policy.add(job("a"), 0.0)
    policy.add(job("b"), 0.0)
    serve(policy, "a", 3)
    assert policy.order(["b", "a"], 0.0) == ["a", "b"]
    serve(policy, "a", 1)
    assert policy.order(["b", "a"], 0.0) == ["b", "a"]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "level"),
    [(0, 0), (30, 0), (31, 1), (70, 1), (71, 2), (1000, 5)],  # length 1 + n / 10 against 4, 8, 16, ...
)
def test_skip_join_enters_where_the_quantum_covers_the_first_iteration(num_prompt_tokens: int, level: int):
    policy = Mlfq(base_quantum_tokens=4, first_iteration=FirstIteration(per_token=0.1))
    assert policy.first_level(job("a", num_uncached_tokens=num_prompt_tokens)) == level
    plain = Mlfq(is_skip_join=False, first_iteration=FirstIteration(per_token=0.1))
    assert plain.first_level(job("a", num_uncached_tokens=num_prompt_tokens)) == 0


def test_an_expected_length_is_a_prior_one_level_above_where_it_would_end():
    """Ladder 0, 4, 12, 28, 60, 124: 100 tokens end in level 4, so it enters at 3."""
    policy = Mlfq(base_quantum_tokens=4)
    assert policy.first_level(job("a", num_expected_output_tokens=100)) == 3
    assert policy.first_level(job("a", num_expected_output_tokens=2)) == 0
    policy.add(job("a", num_expected_output_tokens=100), 0.0)
    serve(policy, "a", 32)  # a whole quantum of level 3
    assert policy.level("a") == 4


def test_three_jobs_with_different_prompts_finish_shortest_first():
    """FastServe's worked example: a long prompt first, two short ones at the same moment."""
    policy = Mlfq(base_quantum_tokens=1, first_iteration=FirstIteration(per_token=1.0))
    for job_id, num_prompt_tokens in (("J1", 8), ("J2", 1), ("J3", 2)):
        policy.add(job(job_id, num_uncached_tokens=num_prompt_tokens), 0.0)
    assert policy.order(["J1", "J2", "J3"], 0.0) == ["J2", "J3", "J1"]


def test_a_session_that_comes_back_starts_afresh():
    policy = Mlfq()
    policy.add(job("a"), 0.0)
    serve(policy, "a", 100)
    policy.remove("a")
    policy.add(job("a"), 1.0)
    assert policy.level("a") == 0


def test_starving_jobs_get_a_slice_every_second_place_and_then_their_own_level_again():
    policy = Mlfq(base_quantum_tokens=4, starvation_s=1.0, boost_tokens=2)
    policy.add(job("long"), 0.0)
    serve(policy, "long", 60)
    level = policy.level("long")
    for turn in range(4):
        policy.add(job(f"new{turn}"), 0.9)
    everyone = ["new0", "new1", "new2", "new3", "long"]
    assert policy.order(everyone, 0.95)[-1] == "long"
    assert policy.order(everyone, 1.0) == ["long", "new0", "new1", "new2", "new3"]
    policy.charge("long", num_output_tokens=1, now_s=1.0)
    assert policy.is_boosted("long")
    policy.charge("long", num_output_tokens=1, now_s=1.1)
    assert not policy.is_boosted("long") and policy.level("long") == level
    assert policy.order(everyone, 1.2)[-1] == "long"


def test_nobody_waits_longer_than_the_bound():
    """40 long jobs, 4 places, and shorts that would take every place: the stated bound on gaps."""
    step_s, num_places, starvation_s, boost = 0.02, 4, 1.0, 4
    policy = Mlfq(starvation_s=starvation_s, boost_tokens=boost)
    longs = [f"long{turn}" for turn in range(40)]
    now_s = 0.0
    for job_id in longs:
        policy.add(job(job_id), now_s)
    last_run = dict.fromkeys(longs, 0.0)
    left: dict[str, int] = {}
    max_gap_s = 0.0
    for step in range(3000):
        while len(left) < num_places:
            job_id = f"s{step}-{len(left)}"
            policy.add(job(job_id, arrival_s=now_s), now_s)
            left[job_id] = 3
        chosen = policy.order([*longs, *left], now_s)[:num_places]
        now_s += step_s
        for job_id in chosen:
            policy.charge(job_id, num_output_tokens=1, now_s=now_s)
            if job_id in left:
                left[job_id] -= 1
                if not left[job_id]:
                    del left[job_id]
                    policy.remove(job_id)
            else:
                max_gap_s = max(max_gap_s, now_s - last_run[job_id])
                last_run[job_id] = now_s
    bound_s = starvation_s + step_s * (1 + boost * math.ceil(len(longs) / math.ceil(num_places / 2)))
    assert max_gap_s <= bound_s
    assert min(last_run.values()) > now_s - bound_s


def test_equally_long_jobs_are_served_in_the_order_of_arrival():
    policy = Mlfq(base_quantum_tokens=4)
    for turn in range(70):
        policy.add(job(f"old{turn}"), 0.0)
        serve(policy, f"old{turn}", 100)
        policy.remove(f"old{turn}")
    policy.add(job("a", arrival_s=1.0), 1.0)
    serve(policy, "a", 50)
    policy.add(job("b", arrival_s=2.0), 2.0)
    assert policy.order(["b", "a"], 100.0) == ["a", "b"]
    serve(policy, "a", 160)  # 210 > 2 x 100: not all are alike after all
    assert policy.order(["b", "a"], 2.0) == ["b", "a"]


def test_priorities_and_deadlines():
    policy = Mlfq()
    policy.add(job("late", deadline_s=9.0), 0.0)
    policy.add(job("soon", deadline_s=2.0), 0.0)
    policy.add(job("free"), 0.0)
    policy.add(job("urgent", priority=-1), 0.0)
    assert policy.order(["late", "soon", "free", "urgent"], 1.0) == ["urgent", "soon", "late", "free"]


def test_waits_grow_with_what_those_ahead_have_to_burn_and_end_with_a_boost():
    """A and B at level 0, C sank to 62 tokens (level 4 of quanta 4): both burn 62 before C's turn."""
    policy = Mlfq(base_quantum_tokens=4, starvation_s=10.0)
    for job_id in "abc":
        policy.add(job(job_id), 0.0)
    serve(policy, "c", 62)
    order = policy.order("abc", 0.0)
    waits = policy.waits(order, num_places=1, step_s=0.02, now_s=0.0)
    assert waits[0] == 0.0
    assert waits[2] == pytest.approx(2 * 63)  # each of the two, and one more token to pass it
    assert policy.waits(order, num_places=1, step_s=1.0, now_s=5.0)[2] == pytest.approx(5.0)


def test_srpt_needs_the_truth():
    policy = Srpt()
    with pytest.raises(ValueError, match="nobody knows"):
        policy.add(job("a"), 0.0)
    policy.add(job("long", num_output_tokens=50), 0.0)
    policy.add(job("short", num_output_tokens=20), 0.0)
    assert policy.order(["long", "short"], 0.0) == ["short", "long"]
    serve(policy, "long", 40)
    assert policy.order(["long", "short"], 0.0) == ["long", "short"]


def test_first_iterations_are_fitted_by_a_line():
    fitted = FirstIteration.fitted([(100, 0.034), (200, 0.046), (400, 0.070)])  # 22 ms + 0.12 ms a token
    assert fitted.per_token == pytest.approx(0.12 / 22)
    step_time = LinearStepTime(base_s=0.022, per_prefill_token_s=0.00012)
    assert FirstIteration.of(step_time).per_token == pytest.approx(0.12 / 22)
    with pytest.raises(ValueError, match="two prompt lengths"):
        FirstIteration.fitted([(100, 0.1), (100, 0.2)])
    with pytest.raises(ValueError, match="rises from above zero"):
        FirstIteration.fitted([(100, 0.2), (200, 0.1)])


def test_shortest_prompt_first_and_ageing_relative_to_length():
    """At 0.05 x wait and 1 ms a token, 1,000 tokens are overtaken by nothing later than 20 s after."""
    policy = ShortestPrefill(per_token_s=0.001, ageing=0.05)
    policy.add(job("long", num_uncached_tokens=1000), 0.0)
    policy.add(job("short", num_uncached_tokens=10, arrival_s=1.0), 1.0)
    policy.add(job("late", num_uncached_tokens=10, arrival_s=20.0), 20.0)
    assert policy.order(["long", "short", "late"], 20.0) == ["short", "long", "late"]


def test_no_more_than_so_many_prompts_are_half_computed():
    policy = ShortestPrefill(max_open=2, chunk_tokens=100)
    for turn in range(4):
        policy.add(job(f"p{turn}", num_uncached_tokens=1000 - turn), 0.0)
    everyone = [f"p{turn}" for turn in range(4)]
    assert policy.order(everyone, 0.0) == ["p3", "p2"]
    policy.charge("p0", num_prefill_tokens=100, now_s=0.0)
    policy.charge("p1", num_prefill_tokens=100, now_s=0.0)
    assert policy.order(everyone, 0.0) == ["p1", "p0"]
    policy.add(job("tiny", num_uncached_tokens=100), 0.0)
    assert policy.order([*everyone, "tiny"], 0.0) == ["tiny", "p1", "p0"]
    policy.charge("p1", num_prefill_tokens=899, now_s=0.0)
    assert policy.order(["p0", "p2", "p3"], 0.0) == ["p0", "p3"]


def test_a_key_with_many_requests_does_not_starve_another():
    policy = FairShare(Mlfq(), quantum_tokens=8)
    greedy = [f"greedy{turn}" for turn in range(50)]
    for job_id in greedy:
        policy.add(job(job_id, key="greedy"), 0.0)
    policy.add(job("modest0", key="modest"), 0.0)
    policy.add(job("modest1", key="modest"), 0.0)
    everyone = [*greedy, "modest0", "modest1"]
    for _ in range(100):
        for job_id in policy.order(everyone, 0.0)[:4]:
            policy.charge(job_id, num_output_tokens=1, now_s=0.0)
    assert policy.served("modest") == pytest.approx(policy.served("greedy"), abs=8 * 4)
    assert policy.served("modest") + policy.served("greedy") == 400


def test_weights_and_returning_keys():
    policy = FairShare(Mlfq(), weights={"gold": 3.0})
    for turn in range(8):
        policy.add(job(f"g{turn}", key="gold"), 0.0)
        policy.add(job(f"b{turn}", key="base"), 0.0)
    everyone = [f"{key}{turn}" for key in "gb" for turn in range(8)]
    for _ in range(400):
        for job_id in policy.order(everyone, 0.0)[:4]:
            policy.charge(job_id, num_output_tokens=1, now_s=0.0)
    assert policy.served("gold") * 3 == pytest.approx(1200, abs=100)
    # A key that was away has not saved up: it starts level with the others.
    policy.add(job("late", key="late"), 9.0)
    assert policy.served("late") == min(policy.served("gold"), policy.served("base"))


def test_one_key_is_the_wrapped_order():
    fair, plain = FairShare(Mlfq()), Mlfq()
    randomness = random.Random(1)
    ids = [f"j{turn}" for turn in range(20)]
    for policy in (fair, plain):
        for job_id in ids:
            policy.add(job(job_id), 0.0)
    for step in range(200):
        job_id = randomness.choice(ids)
        for policy in (fair, plain):
            policy.charge(job_id, num_output_tokens=1, now_s=step * 0.1)
        assert fair.order(ids, step * 0.1) == plain.order(ids, step * 0.1)


@pytest.mark.parametrize("name", ["fcfs", "skip-join-mlfq", "las"])
def test_ordering_256_residents_and_charging_a_batch_takes_less_than_a_millisecond(name: str):
    policy = FairShare(by_name(name))
    ids = [f"j{turn}" for turn in range(256)]
    for turn, job_id in enumerate(ids):
        policy.add(job(job_id, key=f"tenant{turn % 4}"), 0.0)
    started_s = time.process_time()
    num_steps = 200
    for step in range(num_steps):
        order = policy.order(ids, step * 0.02)
        policy.waits(order, num_places=64, step_s=0.02, now_s=step * 0.02)
        for job_id in order[:64]:
            policy.charge(job_id, num_output_tokens=1, now_s=step * 0.02)
    assert (time.process_time() - started_s) / num_steps < 0.001
