"""The step-time model beside what others published. Arithmetic only: no engine, no clock, the same
figures on every machine; the range of a figure is over the points or splits it is the mean of."""

from __future__ import annotations

import random

from baton.step_time import (
    RooflineStepTime,
    Scales,
    StepWork,
    gpu_by_name,
    kv_tokens_that_fit,
    prefill_pairs,
    roofline,
    shape_by_name,
)
from baton.step_time.distserve import CONSTANTS, KV_TOKENS, distserve
from baton.step_time.fit import Observation, every_third, fit_scales
from benchmarks.figures import Bar, Figure
from benchmarks.published_step_times import H100_QWEN3_32B
from benchmarks.samples import Spread, spread

NUM_RANDOM_THIRDS = 200
TABLE = "aiconfigurator 0.12.0, Qwen3-32B on H100, TP 1 to 8"


def figures(quick: bool) -> list[Figure]:
    return [*_published_h100(quick), *_distserve()]


def _h100(tensor_parallel_size: int, scales: Scales) -> RooflineStepTime:
    return roofline(gpu_by_name("h100"), shape_by_name("Qwen3-32B"), tensor_parallel_size, scales=scales)


def _errors(points: list[Observation], scales: Scales) -> list[float]:
    return [abs(_h100(tp, scales).step_s(work) / seconds - 1) for work, seconds, tp in points]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _published_h100(quick: bool) -> list[Figure]:
    points = [Observation(point.work, point.seconds, point.tensor_parallel_size) for point in H100_QWEN3_32B]
    untouched = _errors(points, Scales())
    thirds = [every_third(points, start) for start in range(3)]
    held_out = [_mean(_errors(rest, fit_scales(third, _h100))) for third, rest in thirds]
    chance = random.Random(0)
    drawn = []
    for _ in range(20 if quick else NUM_RANDOM_THIRDS):
        shuffled = chance.sample(points, len(points))
        num_fitted = len(points) // 3
        scales = fit_scales(shuffled[:num_fitted], _h100)
        drawn.append(_mean(_errors(shuffled[num_fitted:], scales)))
    return [
        Figure(
            row="step_time_uncalibrated",
            subject="mean error of shipped constants",
            unit="share",
            spread=Spread(_mean(untouched), min(untouched), max(untouched), len(untouched)),
            bar=Bar("<=", 0.15),
            note=f"{TABLE}; range: single points",
        ),
        Figure(
            row="step_time_calibrated",
            subject="mean error on the two thirds not fitted",
            unit="share",
            spread=spread(held_out),
            bar=Bar("<=", 0.05),
            note=f"{TABLE}; every third point fitted, from the first, second, third",
        ),
        Figure(
            row="step_time_calibrated",
            subject="the same, thirds drawn at random",
            unit="share",
            spread=spread(drawn),
            note="a third that misses a region predicts it worse",
        ),
    ]


def _distserve() -> list[Figure]:
    found = []
    for model, tp in CONSTANTS:
        theirs, ours = distserve(model, tp), roofline(gpu_by_name("a100"), shape_by_name(model), tp)
        prompts = [StepWork(n, prefill_pairs(n)) for n in (512, 1_024, 2_048)]
        decodes = [StepWork(0, 0, batch, batch * 512) for batch in (1, 16, 64)]
        for phase, steps in (("prefill", prompts), ("decode", decodes)):
            found.append(
                Figure(
                    row=f"step_time_distserve_{phase}",
                    subject=f"ours / DistServe's constants, {model} TP{tp}",
                    unit="ratio",
                    spread=spread([ours.step_s(step) / theirs.step_s(step) for step in steps]),
                )
            )
    capacities = [
        kv_tokens_that_fit(gpu_by_name("a100"), shape_by_name(model), tp, pp, memory_utilization=0.95)
        / tokens
        for model, table in KV_TOKENS.items()
        for (tp, pp), tokens in table.items()
        if tokens >= 20_000
    ]
    return [
        *found,
        Figure(
            row="kv_capacity",
            subject="ours / DistServe's table",
            unit="ratio",
            spread=spread(capacities),
            note="0.95 of the memory, as they fill it",
        ),
    ]
