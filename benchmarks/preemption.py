"""Skip-join MLFQ beside first come, first served: on real vLLM engines and in simulated workers.

Real engines run in processes of their own on the clock of engine steps (`step_clock`): the same traces,
one after the other, on vLLM's scheduler and on ours. Nothing but the cost figures depends on how busy
the machine is. Simulated workers run in this process (`preemption_simulation`).
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from baton.demo_model import build_demo_model, is_complete
from baton.scheduling import FairShare, by_name
from baton.scheduling.base import JobFacts
from baton.scheduling.mlfq import BOOST_TOKENS, STARVATION_S
from benchmarks import preemption_fleet
from benchmarks import preemption_simulation as simulation
from benchmarks.figures import Bar, Figure, Report
from benchmarks.layout import DEMO_MODEL, REPOSITORY, SCRATCH
from benchmarks.samples import Spread, spread
from benchmarks.servers import NotReady
from benchmarks.step_clock import STEP_S

POLICY = "skip-join-mlfq"
BATCH_SIZE = 4
ENGINE_TIMEOUT_S = 1_500
KV_BLOCKS = 20
HOST_BYTES = 1 << 30

Trace = list[list[int]]
"""[arrival step, prompt tokens, output tokens] of each request."""


@dataclass(frozen=True, slots=True)
class Effort:
    num_seeds: int
    num_requests: int
    num_simulated_seeds: int
    num_simulated_jobs: int


FULL = Effort(num_seeds=3, num_requests=200, num_simulated_seeds=10, num_simulated_jobs=1500)
QUICK = Effort(num_seeds=1, num_requests=40, num_simulated_seeds=2, num_simulated_jobs=150)


def run(effort: Effort, *, rows: list[str] | None = None) -> Report:
    """`rows`: of engine, memory, step, simulated, prefill, cost, fleet. A quick run starts two engines."""
    report = Report("preemption")
    wanted = rows or [
        "engine",
        "simulated",
        "prefill",
        "cost",
        *(["memory", "step", "fleet"] if effort is FULL else []),
    ]
    if "simulated" in wanted:
        _simulated(report, effort)
    if "prefill" in wanted:
        _simulated_prefills(report, range(effort.num_simulated_seeds), effort.num_simulated_jobs)
    if "cost" in wanted:
        _order_cost(report)
    if not is_complete(DEMO_MODEL):
        build_demo_model(DEMO_MODEL)
    if "cost" in wanted and effort is FULL:
        _schedule_cost(report)
    if "step" in wanted:
        _step_cost(report, effort)
    if "engine" in wanted:
        _on_engines(report, effort)
    if "memory" in wanted:
        _kv_limited(report, effort)
    if "fleet" in wanted:
        preemption_fleet.measure(report, POLICY)
    if "simulated" in wanted:
        report.remarks.append(
            "Judge the mean at load 0.9 of gpu_b16_sharegpt by what there is to gain: the oracle that knows "
            "every length (srpt) has its own row."
        )
    report.remarks.append(
        "Ratios are first come, first served / ours: above 1 ours is better. Completion times of long "
        "requests get worse by design; the p99 rows say how much."
    )
    return report


# ── real engines ─────────────────────────────────────────────────────────────────────────────────


def bimodal(seed: int, num_requests: int, load: float) -> Trace:
    """88 % of the answers have 6-20 tokens, 12 % have 150-250; Poisson arrivals. Load 1: as many tokens
    come per step as a batch gives."""
    randomness = random.Random(seed)
    sizes = [
        randomness.randint(6, 20) if randomness.random() < 0.88 else randomness.randint(150, 250)
        for _ in range(num_requests)
    ]
    clock, trace = 0.0, []
    for size in sizes:
        clock += randomness.expovariate(load * BATCH_SIZE / (0.88 * 13 + 0.12 * 200))
        trace.append([int(clock), randomness.randint(16, 40), size])
    return trace


def head_of_line() -> Trace:
    """Four long requests take all places, then a short one comes every five steps."""
    return [[0, 24, 400] for _ in range(4)] + [[5 * (i + 1), 24, 8] for i in range(40)]


def livelock() -> Trace:
    """A dozen long requests, of which memory holds two, all of them starving again and again, and short ones
    that need room in between: what goes round for ever where whoever starves is brought back for a moment."""
    longs = [[0, 32, 220] for _ in range(12)]
    return longs + [[6 * (i + 1), 24, 8] for i in range(60)]


def play(traces: Sequence[Trace], **choice: Any) -> list[dict[str, Any]]:
    """All traces on one engine, one after the other. Raises NotReady with the end of its log."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    log = SCRATCH / f"preemption-{'-'.join(str(value) for value in choice.values())}.log"
    with log.open("w") as stderr:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.step_clock", str(DEMO_MODEL), json.dumps(choice)],
                input=json.dumps(traces),
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=REPOSITORY,
                text=True,
                timeout=ENGINE_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotReady(f"{choice} was not done after {ENGINE_TIMEOUT_S} s, see {log}") from None
    if done.returncode:
        raise NotReady(f"{choice} ended with {done.returncode}, see {log}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _on_engines(report: Report, effort: Effort) -> None:
    seeds = range(effort.num_seeds)
    busy = [bimodal(seed, effort.num_requests, 1.3) for seed in seeds]
    normal = [bimodal(100 + seed, effort.num_requests, 0.9) for seed in seeds]
    traces = [*busy, *normal, head_of_line()]
    stock = play(traces, scheduler="fcfs", batch_size=BATCH_SIZE)
    ours = play(traces, scheduler=POLICY, batch_size=BATCH_SIZE)
    num = len(busy)
    parts = {
        "engine_1.3": (slice(0, num), busy, 1.5, 5.0, 1.10),
        "engine_0.9": (slice(num, 2 * num), normal, 1.15, 2.5, None),
    }
    for row, (part, part_traces, mean_bar, normalised_bar, steps_bar) in parts.items():
        pairs = list(zip(stock[part], ours[part], part_traces, strict=True))
        _compare(report, row, pairs, mean_bar, normalised_bar, steps_bar)
    _head_of_line(report, stock[2 * num], ours[2 * num])
    report.figures.append(_identical(report, "engine_outputs", list(zip(stock, ours, strict=True))))


def _step_cost(report: Report, effort: Effort) -> None:
    """CPU time of one engine step where everything fits into a batch, engines alternating."""
    quiet = [bimodal(200, effort.num_requests // 2, 0.2)]
    steps, schedules = [], []
    for _ in range(effort.num_seeds):
        [stock] = play(quiet, scheduler="fcfs", batch_size=BATCH_SIZE)
        [ours] = play(quiet, scheduler=POLICY, batch_size=BATCH_SIZE)
        steps.append(ours["step_ms_p50"] / stock["step_ms_p50"])
        schedules.append(ours["schedule_ms_p50"] - stock["schedule_ms_p50"])
    report.figures += [
        _figure("engine_step_cpu_0.2", f"{POLICY} / fcfs", "x", steps, Bar("<=", 1.05)),
        _figure("engine_schedule_cpu_0.2", f"{POLICY} - fcfs", "ms", schedules),
    ]


def _compare(
    report: Report,
    row: str,
    pairs: list[tuple[dict[str, Any], dict[str, Any], Trace]],
    mean_bar: float,
    normalised_bar: float,
    steps_bar: float | None,
) -> None:
    means = [statistics.fmean(a["jct"]) / statistics.fmean(b["jct"]) for a, b, _ in pairs]
    normalised = [_normalised(a, trace) / _normalised(b, trace) for a, b, trace in pairs]
    tails = [
        simulation.percentile(a["jct"], 0.99) / simulation.percentile(b["jct"], 0.99) for a, b, _ in pairs
    ]
    subject = f"fcfs / {POLICY}"
    report.figures += [
        _figure(f"{row}_mean_jct", subject, "x", means, Bar(">=", mean_bar), is_geometric=True),
        _figure(f"{row}_normalised", subject, "x", normalised, Bar(">=", normalised_bar), is_geometric=True),
        _figure(f"{row}_p99_jct", subject, "x", tails, is_geometric=True),
        _figure(
            f"{row}_steps", f"{POLICY} / fcfs", "x", [b["num_steps"] / a["num_steps"] for a, b, _ in pairs],
            None if steps_bar is None else Bar("<=", steps_bar),
        ),
        _figure(
            f"{row}_longest_gap", POLICY, "steps", [b["max_gap"] for _, b, _ in pairs],
            Bar("<=", STARVATION_S / STEP_S + 1 + BOOST_TOKENS * len(pairs[0][2]) / 2),
            note="bar: the stated bound, were all requests starving at once",
        ),
    ]  # fmt: skip


def _head_of_line(report: Report, stock: dict[str, Any], ours: dict[str, Any]) -> None:
    def mean(played: dict[str, Any], part: slice) -> float:
        return statistics.fmean(played["jct"][part])

    shorts, longs = slice(4, None), slice(0, 4)
    report.figures += [
        _figure("head_of_line_short_jobs", f"fcfs / {POLICY}", "x",
                [mean(stock, shorts) / mean(ours, shorts)], Bar(">=", 10)),
        _figure("head_of_line_long_jobs", f"{POLICY} / fcfs", "x",
                [mean(ours, longs) / mean(stock, longs)], Bar("<=", 1.35)),
        _figure("head_of_line_makespan", f"{POLICY} / fcfs", "x",
                [ours["num_steps"] / stock["num_steps"]], Bar("<=", 1.10)),
    ]  # fmt: skip


def _kv_limited(report: Report, effort: Effort) -> None:
    """20 blocks of 32 tokens for four places: a long request takes up to 9."""
    limits = {"batch_size": BATCH_SIZE, "num_blocks": KV_BLOCKS}
    busy = [bimodal(seed, effort.num_requests, 1.3) for seed in range(effort.num_seeds)]
    traces = [*busy, livelock()]
    *stock, stock_locked = play(traces, scheduler="fcfs", **limits)
    *recompute, recompute_locked = play(traces, scheduler=POLICY, **limits)
    *swap, swap_locked = play(traces, scheduler=POLICY, **limits, host_kv_bytes=HOST_BYTES)
    _livelock(report, stock_locked, recompute_locked, swap_locked)
    pairs = list(zip(recompute, swap, strict=True))
    report.figures += [
        _figure("engine_kv_limited_swap_mean_jct", "recompute / swap", "x",
                [statistics.fmean(a["jct"]) / statistics.fmean(b["jct"]) for a, b in pairs],
                Bar(">=", 1.0), is_geometric=True),
        _figure("engine_kv_limited_mean_jct", f"fcfs / {POLICY} with swap", "x",
                [statistics.fmean(a["jct"]) / statistics.fmean(b["jct"])
                 for a, b in zip(stock, swap, strict=True)], is_geometric=True),
        _figure("engine_kv_limited_recomputed", f"{POLICY} with swap", "of generated",
                [max(0, b["num_recomputed_tokens"]) / b["num_output_tokens"] for b in swap], Bar("<=", 0.01)),
        _figure("engine_kv_limited_recomputed", f"{POLICY} without swap", "of generated",
                [b["num_recomputed_tokens"] / b["num_output_tokens"] for b in recompute]),
        _figure("engine_kv_limited_swaps", POLICY, "swaps out", [b["host"]["num_swaps_out"] for b in swap]),
        _figure("engine_kv_limited_preemptions", f"{POLICY} with swap", "per job",
                [b["num_preemptions"] / len(b["jct"]) for b in swap], Bar("<=", 3)),
        _figure("engine_kv_limited_most_preempted", f"{POLICY} with swap", "times, one job",
                [b["max_preemptions"] for b in swap]),
        _figure("engine_kv_limited_swapped", POLICY, "MB out",
                [b["host"]["num_bytes_out"] / 1e6 for b in swap]),
        _figure("engine_kv_limited_stalls", POLICY, "copies at the last moment",
                [b["num_stalls"] for b in swap]),
        _identical(report, "engine_kv_limited_outputs",
                   [*zip(stock, swap, strict=True), *zip(stock, recompute, strict=True)]),
    ]  # fmt: skip


def _livelock(report: Report, stock: dict[str, Any], recompute: dict[str, Any], swap: dict[str, Any]) -> None:
    for subject, played in ((f"{POLICY} with swap", swap), (f"{POLICY} without swap", recompute)):
        report.figures += [
            _figure("engine_livelock_preemptions", subject, "per job",
                    [played["num_preemptions"] / len(played["jct"])], Bar("<=", 3)),
            _figure("engine_livelock_most_preempted", subject, "times, one job", [played["max_preemptions"]]),
            _figure("engine_livelock_makespan", f"{subject} / fcfs", "x",
                    [played["num_steps"] / stock["num_steps"]]),
        ]  # fmt: skip
    report.figures.append(_identical(report, "engine_livelock_outputs", [(stock, swap), (stock, recompute)]))


def _identical(report: Report, row: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Figure:
    shares = [
        sum(a == b for a, b in zip(stock["outputs"], ours["outputs"], strict=True)) / len(stock["outputs"])
        for stock, ours in pairs
    ]
    num = sum(len(stock["outputs"]) for stock, _ in pairs)
    return _figure(
        row, f"{POLICY} = fcfs", "of requests", [min(shares)], Bar(">=", 1.0),
        note=f"token-identical, the worst of {len(shares)} runs, {num} requests in all",
    )  # fmt: skip


def _normalised(played: dict[str, Any], trace: Trace) -> float:
    return statistics.fmean(jct / job[2] for jct, job in zip(played["jct"], trace, strict=True))


# ── simulated workers ────────────────────────────────────────────────────────────────────────────


def _simulated(report: Report, effort: Effort) -> None:
    seeds, num_jobs = range(effort.num_simulated_seeds), effort.num_simulated_jobs
    for workload, bars in (
        (simulation.SHAREGPT_90, {"mean": 1.15, "norm": 2.5, "norm_p95": 4.0, "ttft": 10.0, "p99": 0.40}),
        (simulation.SHAREGPT_110, {"mean": 1.3, "norm": 5.0}),
        (simulation.BIMODAL_90, {"mean": 1.7, "norm": 6.0}),
    ):
        ratios: dict[str, dict[str, list[float]]] = {}
        for seed in seeds:
            jobs = workload.jobs(seed, num_jobs)
            fcfs = simulation.serve(workload, jobs, None, workload.settings)
            for name in ("mlfq", POLICY, "las", "srpt"):
                ours = simulation.serve(workload, jobs, simulation.policy(workload, name), workload.settings)
                for measure, value in _measures(fcfs, ours).items():
                    ratios.setdefault(name, {}).setdefault(measure, []).append(value)
        for measure, values in ratios[POLICY].items():
            bar = Bar(">=", bars[measure]) if measure in bars else None
            report.figures.append(_figure(f"{workload.name}_{measure}", f"fcfs / {POLICY}", "x", values, bar))
        for name in ("mlfq", "las", "srpt"):
            report.figures.append(
                _figure(f"{workload.name}_mean", f"fcfs / {name}", "x", ratios[name]["mean"])
            )
        best = [max(ratios[name]["mean"][i] for name in ("mlfq", POLICY, "las")) for i in seeds]
        leads = [oracle / other for oracle, other in zip(ratios["srpt"]["mean"], best, strict=True)]
        report.figures.append(
            _figure(f"{workload.name}_oracle", "best other / srpt", "x", [min(leads)], Bar(">=", 1.0),
                    note="mean completion time, the worst seed")
        )  # fmt: skip
    for workload, limit in ((simulation.EQUAL, 0.85), (simulation.LONG_PROMPTS, 0.97)):
        values = _means(workload, seeds, num_jobs, POLICY)
        report.figures.append(
            _figure(f"{workload.name}_mean", f"fcfs / {POLICY}", "x", values, Bar(">=", limit))
        )
    _simulated_memory(report, seeds, num_jobs)


def _measures(fcfs: simulation.Served, ours: simulation.Served) -> dict[str, float]:
    def ratio(of: Callable[[simulation.Served], float]) -> float:
        return of(fcfs) / of(ours)

    return {
        "mean": ratio(lambda served: served.mean_s),
        "norm": ratio(lambda served: statistics.fmean(served.normalised_s)),
        "norm_p95": ratio(lambda served: simulation.percentile(served.normalised_s, 0.95)),
        "ttft": ratio(lambda served: statistics.fmean(served.ttft_s)),
        "p99": ratio(lambda served: simulation.percentile(served.jct_s, 0.99)),
    }


def _means(workload: simulation.Workload, seeds: range, num_jobs: int, name: str) -> list[float]:
    means = []
    for seed in seeds:
        jobs = workload.jobs(seed, num_jobs)
        fcfs = simulation.serve(workload, jobs, None, workload.settings)
        ours = simulation.serve(workload, jobs, simulation.policy(workload, name), workload.settings)
        means.append(fcfs.mean_s / ours.mean_s)
    return means


def _simulated_memory(report: Report, seeds: range, num_jobs: int) -> None:
    """Fewer jobs: without swap they pile up, and each step looks at all of them."""
    workload, num_jobs = simulation.KV_LIMITED, min(num_jobs, 500)
    with_swap = replace(workload.settings, can_swap=True)
    over_recompute, over_fcfs, preemptions, lost = [], [], [], []
    for seed in seeds:
        jobs = workload.jobs(seed, num_jobs)
        fcfs = simulation.serve(workload, jobs, None, workload.settings)
        swap = simulation.serve(workload, jobs, simulation.policy(workload, POLICY), with_swap)
        recompute = simulation.serve(workload, jobs, simulation.policy(workload, POLICY), workload.settings)
        over_recompute.append(recompute.mean_s / swap.mean_s)
        over_fcfs.append(fcfs.mean_s / swap.mean_s)
        preemptions.append(swap.num_preemptions / num_jobs)
        lost.append(recompute.num_preemptions / num_jobs)
    report.figures += [
        _figure(f"{workload.name}_mean", "recompute / swap", "x", over_recompute, Bar(">=", 1.5)),
        _figure(f"{workload.name}_mean", f"fcfs / {POLICY} with swap", "x", over_fcfs),
        _figure(f"{workload.name}_preemptions", f"{POLICY} with swap", "per job", preemptions, Bar("<=", 3)),
        _figure(f"{workload.name}_preemptions", f"{POLICY} without swap", "per job", lost,
                note="goes round for ever while load lasts, where an engine lets it"),
    ]  # fmt: skip


def _simulated_prefills(report: Report, seeds: range, num_jobs: int) -> None:
    workload = simulation.PREFILL_MIX
    means, tails = [], []
    for seed in seeds:
        jobs = workload.jobs(seed, num_jobs)
        fcfs = simulation.serve(workload, jobs, None, workload.settings)
        ours = simulation.serve(
            workload, jobs, simulation.policy(workload, "shortest-prefill"), workload.settings
        )
        means.append(fcfs.mean_s / ours.mean_s)
        tails.append(simulation.percentile(fcfs.jct_s, 0.99) / simulation.percentile(ours.jct_s, 0.99))
    report.figures += [
        _figure(f"{workload.name}_ttft", "fcfs / shortest-prefill", "x", means, Bar(">=", 1.5)),
        _figure(f"{workload.name}_ttft_p99", "fcfs / shortest-prefill", "x", tails, Bar(">=", 0.8)),
    ]


# ── cost ─────────────────────────────────────────────────────────────────────────────────────────


def _order_cost(report: Report) -> None:
    """Ordering 256 residents and charging 64 of them, in CPU time; vLLM's own part is not in it."""
    policy = FairShare(by_name(POLICY))
    ids = [str(i) for i in range(256)]
    for job_id in ids:
        policy.add(JobFacts(job_id=job_id, arrival_s=0.0), 0.0)
    costs_ms = []
    for step in range(300):
        started_s = time.process_time()
        order = policy.order(ids, step * STEP_S)
        for job_id in order[:64]:
            policy.charge(job_id, num_output_tokens=1, now_s=step * STEP_S)
        costs_ms.append(1000 * (time.process_time() - started_s))
    report.figures.append(
        _figure("order_cost_256", POLICY, "ms", [statistics.median(costs_ms)], Bar("<=", 1.0))
    )


def _schedule_cost(report: Report) -> None:
    """The whole of schedule(), vLLM's part included, in CPU time: 256 residents, 64 places, and blocks short,
    so that the order, the waits and the choice of victims are all computed in each step."""
    limits = {"scheduler": POLICY, "batch_size": 64, "num_blocks": 600}
    trace = [[0, 40, 60] for _ in range(300)]
    for subject, host_bytes in (("without swap", 0), ("with swap", HOST_BYTES)):
        [played] = play([trace], **limits, host_kv_bytes=host_bytes)
        costs_ms = played["schedule_ms_with_many"]
        report.figures.append(
            _figure("schedule_cost_256", f"{POLICY} {subject}", "ms",
                    [statistics.median(costs_ms)] if costs_ms else [math.inf], Bar("<=", 1.0),
                    note=f"median of {len(costs_ms)} steps, memory short")
        )  # fmt: skip


def _figure(
    row: str,
    subject: str,
    unit: str,
    values: Sequence[float],
    bar: Bar | None = None,
    *,
    is_geometric: bool = False,
    note: str = "",
) -> Figure:
    found = spread(values)
    if is_geometric:
        mean = math.exp(statistics.fmean(map(math.log, values)))
        found = Spread(mean, found.low, found.high, found.num_repeats)
        note = "geometric mean" + (f"; {note}" if note else "")
    return Figure(row=row, subject=subject, unit=unit, spread=found, bar=bar, note=note)
