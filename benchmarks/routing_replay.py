"""What routing is worth, in replays: checks A4 to A10 of the LMetric note, with our own model's step
times (Llama-3.1-8B on H100) and the production router.

    A4   the product without its +1: an idle worker's hits count for nothing
    A5   colocated, conversations, half load: the product beside 4W+R and tuned linear rules
    A6   a prefill pool at 0.5 and 0.85 of its capacity: every policy, per trace, paired by request
    A8   a hot prefix that one worker of 16 owns; and that the guard leaves public traces alone
    A9   prompts everybody holds go to everybody
    A10  what late KV events and progress cost

Deterministic; capacity is measured as `baton.replay.capacity` says, under the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.policy import registry
from baton.policy.base import Candidates, Key, Memoryless
from baton.replay import ReplayResult, ReplaySettings, parse_fleet, replay
from baton.replay.capacity import at_capacity_share, capacity_per_s
from baton.simulation import SimulatedWorkerSettings
from baton.step_time import gpu_by_name, kv_link, kv_tokens_that_fit, roofline, shape_by_name
from baton.workload import (
    HotspotWorkload,
    SessionWorkload,
    Trace,
    parse_lengths,
    read_trace,
    retimed,
    with_session_starts,
)
from baton.workload import spread as spread_arrivals
from baton.workload.trace import NO_SESSION, TraceRequest, trace_of
from benchmarks.figures import Bar, Figure
from benchmarks.samples import Spread

GPU, SHAPE = gpu_by_name("h100"), shape_by_name("Llama-3.1-8B")
PACE = roofline(GPU, SHAPE)
BLOCK_TOKENS = 64
PRODUCT = "lmetric"
LINEAR = tuple(f"linear:{weight:g}" for weight in (0.4, 0.55, 0.7, 0.9))
DECODE_ONLY = ("smallest-batch", "fewest-kv-tokens")
GRID_S = 3.0
"""Of the arrivals in Mooncake's conversation file."""
NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    num_requests: int
    num_seeds: int
    num_sessions: int
    policies: tuple[str, ...]


ALL_POLICIES = (*(name for name in registry.NAMES if name not in (*DECODE_ONLY, "linear")), *LINEAR)
FULL = Effort(num_requests=2000, num_seeds=5, num_sessions=400, policies=ALL_POLICIES)
QUICK = Effort(
    num_requests=400, num_seeds=2, num_sessions=150, policies=(PRODUCT, "p-token", "round-robin", "vllm")
)


def settings(fleet: str, **changes: Any) -> ReplaySettings:
    shape: dict[str, Any] = {
        "num_blocks": kv_tokens_that_fit(GPU, SHAPE) // BLOCK_TOKENS,
        "block_size_tokens": BLOCK_TOKENS,
    }
    return ReplaySettings(
        fleet=parse_fleet(fleet),
        worker=SimulatedWorkerSettings(**shape),
        prefill_time=PACE,
        decode_time=PACE,
        link=kv_link(GPU, is_same_node=False),
        kv_bytes_per_token=SHAPE.kv_bytes_per_token,
        # What is compared is who prefills, by score alone: every prompt is prefilled, where it ranks first.
        has_stay_or_go=False,
        has_guard=False,
        **changes,
    )


def figures(quick: bool, traces: Path) -> list[Figure]:
    """Needs the Mooncake traces and the coding conversations in `traces`; FileNotFoundError or
    WorkloadError if they are not there."""
    effort = QUICK if quick else FULL
    mooncake = {
        name: _first(read_trace(traces / f"mooncake_{name}.jsonl.gz"), effort.num_requests)
        for name in ("conversation", "synthetic")
    }
    coding = read_trace(traces / "coding_conversations.jsonl.gz")
    return [
        *_colocated(effort, coding),
        *_prefill_pool(effort, mooncake),
        *_hotspot(effort, mooncake),
        *_ties(),
        *_staleness(effort, mooncake["conversation"]),
    ]


# ── A4, A5 ───────────────────────────────────────────────────────────────────────────────────


class ProductWithoutOne(Memoryless):
    """The mistake of several ports: an idle worker scores 0 whatever it holds."""

    name = "product without + 1"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return (candidates.p_tokens * candidates.num_legs,)


def _colocated(effort: Effort, coding: Trace) -> list[Figure]:
    """16 workers that do both phases, open loop."""
    base = settings("16both")
    makers: dict[str, Callable[[int], Trace]] = {
        "conversations from a seed": lambda seed: SessionWorkload(
            num_sessions=effort.num_sessions, session_rate_per_s=10.0
        ).generate(seed=seed),
        "coding conversations": lambda seed: with_session_starts(
            _first(_short_turns(coding), effort.num_requests // 2), 1.0, seed=seed
        ),
    }
    found: list[Figure] = []
    for what, make in makers.items():
        capacity = capacity_per_s(make(0), replace(base, prefill_policy=PRODUCT))
        paced = [at_capacity_share(make(seed), 0.5, capacity) for seed in range(effort.num_seeds)]
        runs = {
            name: [replay(trace, replace(base, prefill_policy=name, seed=n)) for n, trace in enumerate(paced)]
            for name in (PRODUCT, "p-token", "vllm", *LINEAR)
        }
        product = runs[PRODUCT]
        note = f"16 colocated workers, {0.5 * capacity:.1f} requests/s, half of what they can take"
        for name, others in runs.items():
            if name == PRODUCT:
                continue
            is_jsq = name == "vllm"
            found += [
                Figure(
                    row="replay_colocated_ttft",
                    subject=f"product / {'4W+R' if is_jsq else name}, {what}",
                    unit="ratio of means",
                    spread=bootstrap_ratio(product, others),
                    bar=Bar("<=", 0.5) if is_jsq else None,
                    note=f"{note}; {_mean_ms(product)} and {_mean_ms(others)}, "
                    f"hits {_hits(product):.1%} and {_hits(others):.1%}",
                ),
                Figure(
                    row="replay_colocated_tpot",
                    subject=f"product / {'4W+R' if is_jsq else name}, {what}",
                    unit="ratio of means",
                    spread=bootstrap_ratio(product, others, value=lambda run: run.tpot_s),
                    bar=Bar("<=", 1.0) if is_jsq else None,
                ),
            ]
        best = min(LINEAR, key=lambda name: float(np.mean([run.ttft_s.mean() for run in runs[name]])))
        found.append(
            Figure(
                row="replay_colocated_ttft",
                subject=f"product / best linear, {what}",
                unit="ratio of means",
                spread=bootstrap_ratio(product, runs[best]),
                bar=Bar("<=", 1.1),
                note=f"the best of {', '.join(LINEAR)} is {best}",
            )
        )
        without = [
            replay(trace, replace(base, prefill_policy=ProductWithoutOne(), seed=n))
            for n, trace in enumerate(paced)
        ]
        found.append(
            Figure(
                row="replay_without_plus_one",
                subject=f"hits without / with + 1, {what}",
                unit="ratio",
                spread=_over_seeds(
                    [a.hit_ratio / b.hit_ratio for a, b in zip(without, product, strict=True)]
                ),
                note=f"mean TTFT {_mean_ms(without)} instead of {_mean_ms(product)}",
            )
        )
    return found


def _short_turns(coding: Trace) -> Trace:
    """Of at most 100,000 tokens."""
    return coding.at_most(100_000)


# ── A6 ───────────────────────────────────────────────────────────────────────────────────────


def _prefill_pool(effort: Effort, traces: dict[str, Trace]) -> list[Figure]:
    """Four prefill workers, and so many decode workers that they are never the bottleneck."""
    base = settings("4P12D")
    found: list[Figure] = []
    for what, trace in traces.items():
        capacity = capacity_per_s(trace, replace(base, prefill_policy=PRODUCT))
        for load in (0.5, 0.85):
            paced = [_paced(trace, load, capacity, seed) for seed in range(effort.num_seeds)]
            runs = {
                name: [replay(t, replace(base, prefill_policy=name, seed=n)) for n, t in enumerate(paced)]
                for name in effort.policies
            }
            for name, others in runs.items():
                ttft = _p99(others)
                note = (
                    f"{_mean_ms(others)} mean, {ttft * 1e3:,.0f} ms p99, hits {_hits(others):.1%}, "
                    f"longest busy / mean {np.mean([run.prefill_imbalance for run in others]):.2f}, "
                    f"{load * capacity:.2f} requests/s"
                )
                subject = f"{name} / product, {what}, load {load:g}"
                found += [
                    Figure(
                        row="replay_prefill_ttft_mean",
                        subject=subject,
                        unit="ratio of means",
                        spread=bootstrap_ratio(others, runs[PRODUCT]),
                        note=note,
                    ),
                    Figure(
                        row="replay_prefill_ttft_p99",
                        subject=subject,
                        unit="ratio",
                        spread=bootstrap_ratio(
                            others, runs[PRODUCT], statistic=lambda v: float(np.percentile(v, 99))
                        ),
                    ),
                ]
    return found


def _paced(trace: Trace, load: float, capacity: float, seed: int) -> Trace:
    """Another realisation of the same traffic: the coarse clock filled in, or new Poisson gaps."""
    if trace.name.endswith("conversation"):
        return at_capacity_share(spread_arrivals(trace, GRID_S, seed=seed), load, capacity)
    return retimed(trace, load * capacity, seed=seed)


# ── A8, A9 ───────────────────────────────────────────────────────────────────────────────────


def _hotspot(effort: Effort, traces: dict[str, Trace]) -> list[Figure]:
    """h = 0.95, x = 0.6, |M| = 1, N = 16. The prefix is nobody's when the burst begins, and belongs to
    whoever gets its first request."""
    burst_start_s = 30.0
    workload = HotspotWorkload(
        rate_per_s=20.0,
        duration_s=90.0,
        prompt=parse_lengths("fixed:2000"),
        output=parse_lengths("fixed:800"),
        hot_share=0.6,
        hot_hit=0.95,
        burst_start_s=burst_start_s,
        block_size_tokens=16,
    )
    coarse = settings("16both")
    num_blocks = coarse.worker.num_blocks * BLOCK_TOKENS // 16
    base = replace(coarse, worker=replace(coarse.worker, block_size_tokens=16, num_blocks=num_blocks))
    peaks: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(effort.num_seeds):
        trace = workload.generate(seed=seed)
        for has_guard in peaks:
            result = replay(trace, replace(base, has_guard=has_guard, seed=seed))
            peaks[has_guard].append(peak_batch_share(result, burst_start_s, workload.duration_s))
    found = [
        Figure(
            row="replay_hotspot_peak",
            subject=f"largest batch / mean batch, {'with' if has_guard else 'without'} the guard",
            unit="ratio",
            spread=_over_seeds(values),
            bar=Bar("<=", 4.0) if has_guard else None,
            note="16 colocated workers, hit fraction 0.95, 60 % of arrivals, one owner",
        )
        for has_guard, values in peaks.items()
    ]
    for what, trace in traces.items():
        for fleet in ("8P8D", "16both"):
            result = replay(trace, replace(settings(fleet), has_guard=True))
            found.append(
                Figure(
                    row="replay_guard_at_rest",
                    subject=f"times the guard acts, {what}, {fleet}",
                    unit="times",
                    spread=_over_seeds([float(result.num_guard_acts)]),
                    bar=Bar("<=", 0.0),
                )
            )
    return found


def peak_batch_share(result: ReplayResult, start_s: float, end_s: float) -> float:
    """The largest batch over the mean batch of the fleet, at the worst moment between the two."""
    num_workers = result.settings.fleet.num_workers
    times = np.concatenate([result.arrival_s, result.finished_s])
    changes = np.concatenate([np.ones(len(result.arrival_s)), -np.ones(len(result.finished_s))])
    workers = np.concatenate([result.decode_worker, result.decode_worker])
    batches = np.zeros(num_workers)
    worst = 0.0
    for at in np.argsort(times, kind="stable"):
        batches[workers[at]] += changes[at]
        if start_s <= times[at] <= end_s and batches.any():
            worst = max(worst, float(batches.max() / batches.mean()))
    return worst


def _ties() -> list[Figure]:
    """The same prompt over and over: first all at once, so that every worker holds it, then one by one."""
    hashes = np.arange(1, 64, dtype=np.int64)
    arrivals = [0.0] * 256 + [60.0 + n for n in range(800)]
    requests = [
        TraceRequest(0, arrival_s, 63 * BLOCK_TOKENS + 1, 8, hashes, NO_SESSION, 0, 0.0)
        for arrival_s in arrivals
    ]
    result = replay(trace_of(requests, name="one prompt", block_size_tokens=BLOCK_TOKENS), settings("8both"))
    shares = np.bincount(result.decode_worker[256:], minlength=8) / 800
    return [
        Figure(
            row="replay_full_hit_ties",
            subject="largest share / equal share, one prompt that all 8 workers hold",
            unit="ratio",
            spread=_over_seeds([float(shares.max() * 8)]),
            bar=Bar("<=", 1.2),
        )
    ]


# ── A10 ──────────────────────────────────────────────────────────────────────────────────────


def _staleness(effort: Effort, trace: Trace) -> list[Figure]:
    base = settings("4P12D")
    capacity = capacity_per_s(trace, base)
    found: list[Figure] = []
    for load in (0.5, 0.85):
        paced = [_paced(trace, load, capacity, seed) for seed in range(effort.num_seeds)]
        at_once = [replay(t, replace(base, seed=n)) for n, t in enumerate(paced)]
        for delay_s in (0.01, 0.1, 1.0):
            late = [replay(t, replace(base, report_delay_s=delay_s, seed=n)) for n, t in enumerate(paced)]
            found.append(
                Figure(
                    row="replay_staleness",
                    subject=f"mean TTFT, reports {delay_s * 1e3:g} ms late / at once, load {load:g}",
                    unit="ratio of means",
                    spread=bootstrap_ratio(late, at_once),
                    bar=Bar("<=", 1.05) if delay_s == 0.01 else None,
                    note="decisions are committed at once; KV events and prefill progress come late",
                )
            )
    return found


# ── numbers ──────────────────────────────────────────────────────────────────────────────────


def bootstrap_ratio(
    ours: Sequence[ReplayResult],
    theirs: Sequence[ReplayResult],
    *,
    value: Callable[[ReplayResult], NDArray[np.float64]] = lambda run: run.ttft_s,
    statistic: Callable[[NDArray[np.float64]], float] = lambda values: float(values.mean()),
) -> Spread:
    """Statistic over statistic, with the 95 % interval of resampling requests, the same ones on both
    sides: run i of both saw the same trace."""
    a = np.concatenate([value(run) for run in ours])
    b = np.concatenate([value(run) for run in theirs])
    assert len(a) == len(b)
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(NUM_RESAMPLES):
        chosen = rng.integers(0, len(a), len(a))
        ratios.append(statistic(a[chosen]) / statistic(b[chosen]))
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return Spread(statistic(a) / statistic(b), low, high, len(ours))


def _over_seeds(values: Sequence[float]) -> Spread:
    return Spread(float(np.median(values)), min(values), max(values), len(values))


def _mean_ms(runs: Sequence[ReplayResult]) -> str:
    return f"{np.mean([run.ttft_s.mean() for run in runs]) * 1e3:,.0f} ms"


def _p99(runs: Sequence[ReplayResult]) -> float:
    return float(np.percentile(np.concatenate([run.ttft_s for run in runs]), 99))


def _hits(runs: Sequence[ReplayResult]) -> float:
    return float(np.mean([run.hit_ratio for run in runs]))


def _first(trace: Trace, num_requests: int) -> Trace:
    return trace.first(min(num_requests, len(trace)))
