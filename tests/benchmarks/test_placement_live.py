import time

import pytest

from benchmarks.placement_live import REAL_WORKLOAD, SIMULATED, figures_of, fleet_file
from placement.running import predicted_fleet
from placement.simulator import SplitFleet
from placement.slo import Attainment
from placement.validate import Row, Validation
from placement.workload import load_workload


def row(predicted: float, observed: float, *, is_at_knee: bool) -> Row:
    times = (0.1, 0.2)
    return Row(
        rate_per_s=1.0,
        predicted=Attainment(predicted, predicted, 1.0),
        observed=Attainment(observed, observed, 1.0),
        predicted_ttft_s=times,
        observed_ttft_s=times,
        predicted_tpot_s=times,
        observed_tpot_s=times,
        is_at_knee=is_at_knee,
        num_failed=0,
        late_s=0.0,
    )


def test_the_bar_looks_at_the_worst_rate_away_from_the_knee():
    rows = [
        row(1.0, 0.98, is_at_knee=False),
        row(0.9, 0.5, is_at_knee=True),
        row(0.1, 0.18, is_at_knee=False),
    ]
    away, at_knee = figures_of("1P1D", Validation(rows, 0.0, 0.0, None))
    assert round(away.spread.median, 6) == 0.08
    assert away.holds is False
    assert (at_knee.spread.median, at_knee.holds) == (0.4, None)


def test_its_simulated_fleets_can_be_predicted_and_its_workloads_read():
    fleet = predicted_fleet(fleet_file(2, 1, SIMULATED), None, longest_prompt=1_000)
    assert isinstance(fleet, SplitFleet)
    assert (fleet.num_prefill, fleet.num_decode) == (2, 1)
    assert load_workload(REAL_WORKLOAD).num_prompt_tokens.max() <= 1_000


def test_a_slow_engine_takes_a_multiple_of_its_own_time(monkeypatch: pytest.MonkeyPatch):
    slow_worker = pytest.importorskip("benchmarks.slow_worker")

    def computes(_worker: object, started_s: float) -> float:
        while time.thread_time() - started_s < 0.02:
            pass
        return time.thread_time() - started_s

    monkeypatch.setattr(slow_worker.BatonCPUWorker, "execute_model", computes)
    started_s = time.monotonic()
    computed_s = slow_worker.SlowCPUWorker.execute_model(
        object.__new__(slow_worker.SlowCPUWorker), time.thread_time()
    )
    assert time.monotonic() - started_s >= 0.99 * slow_worker.SLOWDOWN * computed_s
