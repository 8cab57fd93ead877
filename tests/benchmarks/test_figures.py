"""From repeats to figures, bars and tables."""

from __future__ import annotations

import json

import pytest

from benchmarks.figures import Bar, Figure, Report
from benchmarks.samples import Spread, paired_ratios, per_token, percentile, spread


def test_a_spread_is_median_and_range():
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0, num_repeats=3)
    with pytest.raises(ValueError):
        spread([])


def test_ratios_pair_repeats_that_ran_side_by_side():
    """A machine twice as slow in the second repeat disturbs both sides and no ratio."""
    assert paired_ratios([50.0, 100.0], [100.0, 200.0]) == [0.5, 0.5]
    with pytest.raises(ValueError, match="1 repeats beside 2"):
        paired_ratios([1.0], [1.0, 2.0])


def test_a_token_costs_what_many_cost_more_than_few():
    assert per_token(2200.0, 220.0, 200, 2) == pytest.approx(10.0)  # (2200 - 220) / 198
    with pytest.raises(ValueError):
        per_token(1.0, 1.0, 2, 2)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 51.0), (0.99, 99.0), (1.0, 100.0)])
def test_percentiles_are_values_that_were_seen(share: float, expected: float):
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, share) == expected  # index int(99 * share + 0.5) of 1..100


@pytest.mark.parametrize(
    ("bar", "value", "holds"),
    [
        (Bar("<=", 0.5), 0.5, True),
        (Bar("<=", 0.5), 0.51, False),
        (Bar(">=", 1.2), 1.2, True),
        (Bar(">=", 1.2), 1.19, False),
    ],
)
def test_a_bar_includes_its_limit(bar: Bar, value: float, holds: bool):
    assert bar.holds(value) is holds


def test_a_report_judges_medians_and_writes_one_object_per_figure():
    report = Report("door")
    report.figures = [
        Figure(row="cpu", subject="baton", unit="us", spread=spread([90.0, 100.0, 300.0])),
        Figure(
            row="cpu ratio", subject="a / b", unit="x", spread=spread([0.4, 0.45, 0.9]), bar=Bar("<=", 0.5)
        ),
        Figure(row="p99 ratio", subject="a / b", unit="x", spread=spread([1.1]), bar=Bar("<=", 1.0)),
    ]
    report.busy_before = {"cpu": 0.02, "p99": 1.5}
    assert [figure.name for figure in report.missed] == ["p99 ratio: a / b"]
    assert report.noisy_rows == ["p99"]
    assert json.loads(json.dumps(report.figures[1].as_json())) == {
        "name": "cpu ratio: a / b",
        "value": 0.45,
        "unit": "x",
        "bar": "<= 0.5",
        "holds": True,
        "repeats": 3,
        "interval": [0.4, 0.9],
    }
    assert "MISSED" in report.table().splitlines()[-1]
    markdown = report.markdown({"cores": 2, "peers": {"x": "1.0"}}, "scripts/bench.sh door")
    assert "| p99 ratio: a / b | 1.100 | 1.100 – 1.100 | 1 | x | <= 1 | **missed** |" in markdown
    assert "- peers: x 1.0" in markdown
    assert json.loads(report.json_document({"cores": 2}, "c"))["busy_cores_before"] == {
        "cpu": 0.02,
        "p99": 1.5,
    }
