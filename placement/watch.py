"""Is the plan still right for what the fleet is asked? Advice only: nothing is started or stopped here.

The recorded requests become the planner's workload. Two questions are simulated with it: does the fleet that
runs keep the SLO at the recorded rate, and with which reserve; and how many GPUs would the best placement
need for that rate and the same reserve.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baton.launch.fleet_file import FleetFile
from baton.workload import WorkloadError
from placement.cluster import Split
from placement.evaluation import Bench, Candidate, Problem
from placement.planner import answer
from placement.plans import ColocatedPlan, Plan, SplitPlan
from placement.workload import Workload

MIN_REQUESTS = 200
"""With fewer, lengths and rate are too uncertain to advise a change."""

RESERVE = 1.2
"""The plan should serve so many times the recorded rate: a window's mean hides its busier minutes."""

WORTH_SAVING = 0.8
"""Another placement is worth the change when it needs at most this share of the GPUs."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The requests of the latest window."""

    workload: Workload
    rate_per_s: float
    num_requests: int
    span_s: float
    num_skipped: int
    """Lines that could not be read: half-written ones, or not of this file's form."""


@dataclass(frozen=True, slots=True)
class Advice:
    is_stale: bool
    reason: str
    attainment: float
    """Predicted of the running fleet at the recorded rate."""
    highest_per_s: float
    """The rate up to which it keeps the SLO with this workload."""
    suggestion: Candidate | None
    """None: nothing better, or nothing keeps the SLO."""


def read_recorded(path: Path, *, window_s: float) -> Recorded:
    """The last `window_s` seconds of a coordinator's workload log, its predecessor included. Raises
    WorkloadError when there are fewer than MIN_REQUESTS."""
    rows, num_skipped = _rows(_lines(path))
    if not rows:
        raise WorkloadError(f"{path} has no requests yet")
    rows.sort()
    since_s = rows[-1][0] - window_s
    rows = [row for row in rows if row[0] >= since_s]
    if len(rows) < MIN_REQUESTS:
        raise WorkloadError(
            f"{path} has {len(rows)} requests of the last {window_s:g} s, advice needs {MIN_REQUESTS}"
        )
    table = np.array(rows)
    span_s = float(table[-1, 0] - table[0, 0])
    if span_s <= 0:
        raise WorkloadError(f"{path}: all {len(rows)} requests came at one moment, there is no rate")
    lengths = table[:, 1:].astype(np.int64)
    workload = Workload(
        name=path.name,
        num_prompt_tokens=lengths[:, 0],
        num_output_tokens=lengths[:, 1],
        num_cached_tokens=np.minimum(lengths[:, 2], lengths[:, 0] - 1),
        gaps=np.diff(table[:, 0], prepend=table[0, 0] - span_s / (len(rows) - 1)),
    )
    return Recorded(workload, (len(rows) - 1) / span_s, len(rows), span_s, num_skipped)


def running_plan(file: FleetFile) -> Plan:
    """Raises WorkloadError for a fleet that mixes workers of both phases with others."""
    num_both = file.num_workers("both")
    num_prefill, num_decode = file.num_workers("prefill"), file.num_workers("decode")
    if num_both and (num_prefill or num_decode):
        raise WorkloadError("the fleet mixes workers for both phases with others, which is not planned")
    if num_both:
        settings = file.settings.get("both", {})
        return ColocatedPlan(_split(settings), num_both, settings.get("max_num_batched_tokens"))
    return SplitPlan(
        _split(file.settings.get("prefill", {})),
        num_prefill,
        _split(file.settings.get("decode", {})),
        num_decode,
    )


def advise(problem: Problem, plan: Plan, recorded_rate_per_s: float) -> Advice:
    """`problem`: with the recorded workload; its rate is not used. Raises WorkloadError when the running
    plan does not fit the hardware it is said to run on, ModelDoesNotFit."""
    bench = Bench(dataclasses.replace(problem, rate_per_s=None))
    fleet = bench.fleet(plan)
    if fleet is None:
        raise WorkloadError(f"the running {plan} does not fit into {problem.cluster.prefill} as described")
    _, _, now = bench.at_rate(fleet, recorded_rate_per_s)
    highest = bench.estimate(fleet).mean
    needed = recorded_rate_per_s * RESERVE
    best = answer(dataclasses.replace(problem, rate_per_s=needed)).best
    if highest < recorded_rate_per_s:
        reason = (
            f"keeps the SLO up to {highest:.3g} requests/s, {recorded_rate_per_s:.3g} come: "
            f"{now.both:.0%} of requests keep it by prediction, {problem.slo.attainment:.0%} should"
        )
        return Advice(True, reason, now.both, highest, best)
    if highest < needed:
        reason = (
            f"keeps the SLO up to {highest:.3g} requests/s, {recorded_rate_per_s:.3g} come: "
            f"less than {RESERVE - 1:.0%} reserve"
        )
        return Advice(True, reason, now.both, highest, best)
    if best is not None and best.plan.num_gpus <= WORTH_SAVING * plan.num_gpus:
        reason = f"{_gpus(best.plan.num_gpus)} would do for {needed:.3g} requests/s, it has {plan.num_gpus}"
        return Advice(True, reason, now.both, highest, best)
    reserve = highest / recorded_rate_per_s - 1
    return Advice(False, f"keeps the SLO with {reserve:.0%} reserve", now.both, highest, None)


def sentence(advice: Advice, plan: Plan, recorded: Recorded) -> str:
    asked = f"{recorded.num_requests} requests in {recorded.span_s:,.0f} s, {recorded.workload.sentence()}"
    text = f"{'stale' if advice.is_stale else 'fresh'}: {plan} {advice.reason}\n  recorded: {asked}"
    if advice.suggestion is not None:
        found = advice.suggestion
        text += (
            f"\n  would do: {found.plan}, {found.goodput.mean:.3g} requests/s on {_gpus(found.plan.num_gpus)}"
        )
    elif advice.is_stale:
        text += "\n  no placement on this hardware serves it"
    return text


def _lines(path: Path) -> Iterable[str]:
    before = path.with_name(path.name + ".1")
    try:
        for part in (before, path):
            if part is path or part.exists():
                yield from part.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror}") from None


def _rows(lines: Iterable[str]) -> tuple[list[tuple[float, int, int, int]], int]:
    rows, num_skipped = [], 0
    for line in lines:
        try:
            values: dict[str, Any] = json.loads(line)
            row = (
                float(values["arrival_s"]),
                int(values["num_prompt_tokens"]),
                int(values["num_output_tokens"]),
                int(values.get("num_cached_tokens", 0)),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            num_skipped += 1
            continue
        if row[1] >= 1 and row[2] >= 1:
            rows.append(row)
    return rows, num_skipped


def _gpus(count: int) -> str:
    return f"{count} GPU" + ("s" if count != 1 else "")


def _split(settings: dict[str, Any]) -> Split:
    return Split(settings.get("tensor_parallel_size", 1), settings.get("pipeline_parallel_size", 1))
