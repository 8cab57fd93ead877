"""What the routing and twin benches compute besides running things."""

import pytest

from baton.contract.lifecycle import Outcome
from baton.contract.messages import Placement, RequestReport
from baton.step_time import LinearStepTime
from baton.step_time.text import parse_step_time
from baton.workload import SessionWorkload, SingleTurnWorkload, parse_lengths
from benchmarks.routing_balance import _deviation_percent
from benchmarks.routing_memory import CACHE_BLOCKS, Churn
from benchmarks.trace_load import Answered, _chains
from benchmarks.twin_fidelity import as_text


def answered(position: int, prefill: str) -> Answered:
    report = RequestReport(outcome=Outcome.COMPLETED, placement=Placement(prefill_worker=prefill))
    return Answered(position, 0.0, 0.5, 2.5, 5, report)


def test_a_worker_without_work_deviates_by_all_of_the_mean():
    answers = [answered(number, name) for number, name in enumerate(["a", "a", "a", "b"])]
    assert _deviation_percent(answers, "prefill", 2) == pytest.approx(50.0)  # 3 and 1, mean 2
    assert _deviation_percent(answers, "prefill", 4) == pytest.approx(200.0)  # 3, 1, 0 and 0, mean 1


def test_time_per_token_leaves_out_the_first():
    assert answered(0, "a").tpot_s == pytest.approx(0.5)  # (2.5 - 0.5) / (5 - 1)


def test_who_waits_for_whom():
    trace = SessionWorkload(num_sessions=4, session_rate_per_s=1.0, mean_turns=3.0).generate(seed=1)
    assert _chains(trace, "open") == [[position] for position in range(len(trace))]
    assert _chains(trace, "one at a time") == [list(range(len(trace)))]
    closed = _chains(trace, "closed")
    assert len(closed) == 4
    for chain in closed:
        assert trace.turns[chain].tolist() == list(range(len(chain)))
    alone = SingleTurnWorkload(
        num_requests=3, rate_per_s=1.0, prompt=parse_lengths("9"), output=parse_lengths("1")
    ).generate(seed=1)
    assert _chains(alone, "closed") == [[0], [1], [2]]


def test_a_step_time_survives_the_command_line():
    step_time = LinearStepTime(
        base_s=0.1 + 0.2, per_prefill_token_s=1e-7 / 3, per_decode_s=5e-5, per_context_token_s=0.0
    )
    assert parse_step_time(as_text(step_time)) == step_time


def test_the_memory_bench_indexes_what_its_workers_hold():
    churn = Churn()
    for _ in range(200):
        churn.request()
    # Two blocks a prompt, on the prefill and on the decode worker, the same block counted once.
    assert churn.num_indexed == 400 < CACHE_BLOCKS
