"""Attainment against rate per GPU, and against the scale of the SLO, of the best plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from placement.evaluation import Bench, Candidate
from placement.explain import attainment_curve
from placement.planner import Answer
from placement.slo import attained


def plot(found: Answer, path: str | Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bench = Bench(found.problem)
    slo = found.problem.slo
    shown = [ranking.candidates[0] for ranking in (found.split, found.colocated) if ranking.candidates]
    figure, (by_rate, by_scale) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for candidate in shown:
        fleet = bench.fleet(candidate.plan)
        if fleet is None:
            continue
        rates = np.linspace(0.1, 1.4, 27) * candidate.goodput.mean
        by_rate.plot(
            rates / candidate.charged_gpus, attainment_curve(bench, fleet, rates), label=str(candidate.plan)
        )
        scales = np.geomspace(0.25, 4, 33)
        common_per_gpu = _common_rate(shown)
        done, trial, _ = bench.at_rate(fleet, common_per_gpu * candidate.charged_gpus)
        by_scale.plot(
            scales, [attained(done, trial.counted, slo.scaled(float(s))).both for s in scales],
            label=str(candidate.plan),
        )  # fmt: skip
    for axes, label in ((by_rate, "requests/s per GPU"), (by_scale, "SLO scale (left is tighter)")):
        axes.axhline(slo.attainment, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel=label, ylabel="SLO attainment", ylim=(0, 1.02))
        axes.legend(fontsize=8)
    by_scale.set_xscale("log")
    by_rate.set_title(str(slo), fontsize=9)
    if shown:
        by_scale.set_title(f"at {_common_rate(shown):.3g} requests/s per GPU", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _common_rate(candidates: list[Candidate]) -> float:
    """One that both can be compared at: 80 % of the better one's goodput."""
    return 0.8 * max(candidate.per_gpu.mean for candidate in candidates)
