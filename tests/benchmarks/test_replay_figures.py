"""The replay benchmarks' own arithmetic, and fidelity against numbers dynamo.replay gave once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from baton.replay import ReplayResult, ReplaySettings, parse_fleet, replay
from baton.simulation import SimulatedWorkerSettings
from baton.step_time import LinearStepTime, StepWork
from baton.workload import SessionWorkload, read_trace
from benchmarks.replay_fidelity import Cell, DynamoPace, ours
from benchmarks.routing_replay import ProductWithoutOne, bootstrap_ratio, peak_batch_share

TRACES = Path(__file__).parents[2].parent / "shared" / "traces"


def test_the_peers_pace_is_what_its_single_requests_take():
    """dynamo.replay 1.6.1, 16,384 blocks: a prompt of 8,192 tokens ends after 169.137 ms, and the first
    decode step over it takes 6.160 ms."""
    pace = DynamoPace(num_kv_tokens=16_384 * 64)
    assert pace.step_s(StepWork(8192)) == pytest.approx(0.169137, abs=1e-6)
    assert pace.step_s(StepWork(0, 0.0, 1, 8192)) == pytest.approx(0.0061604, abs=1e-6)


@pytest.mark.skipif(not TRACES.is_dir(), reason="needs the public traces in ../shared/traces")
@pytest.mark.parametrize(
    ("name", "mean_s", "p99_s", "hit_ratio"),
    [
        ("mooncake_conversation", 0.50704, 2.5509, 0.08632),
        ("mooncake_synthetic", 0.324, 1.701, 0.055),
    ],
)
def test_round_robin_is_what_the_peer_says_of_it(name: str, mean_s: float, p99_s: float, hit_ratio: float):
    outcome = ours(
        Cell(trace=name, num_workers=4, speedup=1.0),
        read_trace(TRACES / f"{name}.jsonl.gz"),
        prefill_policy="round-robin",
        decode_policy="round-robin",
        first_token_by="decode",
    )
    assert outcome.ttft_mean_s == pytest.approx(mean_s, rel=0.03)
    assert outcome.ttft_p99_s == pytest.approx(p99_s, rel=0.03)
    assert outcome.hit_ratio == pytest.approx(hit_ratio, rel=0.03)


def small(policy: object = "lmetric") -> ReplayResult:
    pace = LinearStepTime(base_s=0.004, per_prefill_token_s=2e-5, per_decode_s=2e-5)
    return replay(
        SessionWorkload(num_sessions=40, session_rate_per_s=5.0).generate(seed=1),
        ReplaySettings(
            fleet=parse_fleet("4both"),
            worker=SimulatedWorkerSettings(num_blocks=2000, block_size_tokens=64),
            prefill_time=pace,
            decode_time=pace,
            prefill_policy=policy,  # type: ignore[arg-type]
        ),
    )


def test_without_plus_one_idle_workers_hits_are_lost():
    assert small(ProductWithoutOne()).hit_ratio < small().hit_ratio


def test_a_run_beside_itself_is_one_with_no_interval():
    result = small()
    found = bootstrap_ratio([result], [result])
    assert (found.median, found.low, found.high) == (1.0, 1.0, 1.0)
    slower = bootstrap_ratio([result], [result], value=lambda run: run.ttft_s, statistic=np.ptp)
    assert slower.median == 1.0


def test_the_peak_batch_is_at_least_the_mean():
    result = small()
    whole = peak_batch_share(result, 0.0, float(result.arrival_s.max()))
    late = peak_batch_share(result, 5.0, float(result.arrival_s.max()))
    assert whole >= late >= 1.0
