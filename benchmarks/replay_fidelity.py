"""Baton's replay beside dynamo.replay (PyPI ai-dynamo 1.6.1), on the same traces in the same run.

First fidelity: round robin, their step times, KV that moves in no time. Nothing is left to decide, so
both simulators must say the same. Then the comparison: their kv_router with its defaults against what
Baton does, over the same step times, in every cell; losses are printed like wins.

Baton's times to first token are what a client of each system waits: in Baton the prefill worker says
the first token, in dynamo.replay it comes with the first decode step. How much of the difference that
is stands in a row of its own.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from baton.policy import registry
from baton.replay import FleetShape, ReplayResult, ReplaySettings, Slo, replay, spread
from baton.simulation import SimulatedWorkerSettings
from baton.step_time import StepWork
from baton.worker.engines import DEFAULT_PREFILL_SCHEDULER, PREFILL_WINDOW_TOKENS
from baton.workload import Trace, read_trace, sped_up
from benchmarks.figures import Bar, Figure
from benchmarks.peers import DYNAMO
from benchmarks.samples import Spread
from benchmarks.samples import spread as over_repeats

SLO = Slo(ttft_s=2.0, tpot_s=0.05)
BLOCK_TOKENS = 64
BLOCKS = 16_384
FEW_BLOCKS = 4_096
TRACES = ("mooncake_conversation", "mooncake_synthetic")


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoPace:
    """The "polynomial" step times of dynamo.replay 1.6.1 (aisimulate's mocker): milliseconds from new
    tokens, and from the share of the KV cache that the decoding sequences read."""

    num_kv_tokens: int

    def step_s(self, work: StepWork) -> float:
        total_ms = 0.0
        if tokens := work.num_prefill_tokens:
            total_ms += 4.209989e-7 * tokens**2 + 1.518344e-2 * tokens + 16.50142
        if work.num_decodes:
            share = min(1.0, work.num_context_tokens / self.num_kv_tokens)
            total_ms += max(1.0, -25.74 * share**2 + 54.01 * share + 5.74)
        return total_ms / 1000

    def cadence_s(self, work: StepWork) -> float:
        return self.step_s(work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    trace: str
    num_workers: int
    """Of each phase."""
    speedup: float
    num_blocks: int = BLOCKS

    def __str__(self) -> str:
        few = f", {self.num_blocks:,} blocks" if self.num_blocks != BLOCKS else ""
        fleet = f"{self.num_workers}P{self.num_workers}D"
        return f"{self.trace.removeprefix('mooncake_')} {fleet} x{self.speedup:g}{few}"


CELLS = tuple(
    Cell(trace=trace, num_workers=workers, speedup=speedup, num_blocks=blocks)
    for trace in TRACES
    for workers, speedup, blocks in (
        (4, 1.0, BLOCKS), (4, 2.0, BLOCKS), (8, 2.0, BLOCKS), (8, 4.0, BLOCKS), (4, 1.0, FEW_BLOCKS),
    )
)  # fmt: skip
OVERLOAD = Cell(trace="mooncake_conversation", num_workers=4, speedup=2.0, num_blocks=FEW_BLOCKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way of running Baton."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    is_product: bool = False


WINDOW = {"prefill_window_tokens": PREFILL_WINDOW_TOKENS["cuda"]}
"""What a vLLM prefill worker on CUDA asks for when nothing else is said."""
SHORTEST = {"prefill_scheduler": DEFAULT_PREFILL_SCHEDULER}
P_TOKEN = {"prefill_policy": "p-token"}
PRODUCT = Variant(name="baton", settings=WINDOW | SHORTEST, is_product=True)
VARIANTS = (
    PRODUCT,
    Variant(name="baton p-token", settings=P_TOKEN | WINDOW | SHORTEST),
    Variant(name="baton p-token, no window", settings=P_TOKEN | SHORTEST),
    Variant(name="baton, first come first served", settings=WINDOW),
    Variant(name="baton, first come first served, no window"),
    Variant(name="baton, first come first served, window of 8,192", settings={"prefill_window_tokens": 8192}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One replay, theirs or ours."""

    ttft_mean_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    hit_ratio: float
    goodput: float
    requests_per_cpu_s: float


def ours(cell: Cell, trace: Trace, *, seed: int = 0, **changes: Any) -> Outcome:
    result = run_ours(cell, trace, seed=seed, **changes)
    ttft, tpot = spread(result.ttft_s), spread(result.tpot_s)
    return Outcome(
        ttft_mean_s=ttft.mean,
        ttft_p99_s=ttft.p99,
        tpot_mean_s=tpot.mean,
        tpot_p99_s=tpot.p99,
        hit_ratio=result.hit_ratio,
        goodput=result.goodput(SLO),
        requests_per_cpu_s=result.requests_per_cpu_s,
    )


def run_ours(cell: Cell, trace: Trace, *, seed: int = 0, **changes: Any) -> ReplayResult:
    pace = DynamoPace(num_kv_tokens=cell.num_blocks * BLOCK_TOKENS)
    settings: dict[str, Any] = {
        "prefill_policy": registry.DEFAULT_PREFILL,
        "decode_policy": registry.DEFAULT_DECODE,
        "seed": seed,
        # The peer prefills every prompt on a prefill worker, and the first one by its score.
        "has_stay_or_go": False,
        "has_guard": False,
    }
    return replay(
        sped_up(trace, cell.speedup),
        ReplaySettings(
            fleet=FleetShape(cell.num_workers, cell.num_workers),
            worker=SimulatedWorkerSettings(num_blocks=cell.num_blocks, block_size_tokens=BLOCK_TOKENS),
            prefill_time=pace,
            decode_time=pace,
            **(settings | changes),
        ),
    )


class Peer:
    """dynamo.replay in its own Python, for as long as the measurement lasts."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder

    def play(self, cell: Cell, mode: str) -> Outcome:
        command = {
            "trace": str(self._folder / f"{cell.trace}.jsonl"),
            "num_prefill": cell.num_workers,
            "num_decode": cell.num_workers,
            "speedup": cell.speedup,
            "num_blocks": cell.num_blocks,
            "mode": mode,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"dynamo.replay ended with status {self._process.wait(10)} in {cell}")
        summary = json.loads(line)
        return Outcome(
            ttft_mean_s=summary["mean_ttft_ms"] / 1e3,
            ttft_p99_s=summary["p99_ttft_ms"] / 1e3,
            tpot_mean_s=summary["mean_tpot_ms"] / 1e3,
            tpot_p99_s=summary["p99_tpot_ms"] / 1e3,
            hit_ratio=summary["prefix_cache_reused_ratio"],
            goodput=summary["goodput_completed_requests"] / summary["num_requests"],
            requests_per_cpu_s=summary["num_requests"] / summary["cpu_s"],
        )


@contextmanager
def peer(traces: Path, num_requests: int | None) -> Iterator[Peer]:
    """`num_requests`: only the first ones of each trace."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for trace in TRACES:
            with gzip.open(traces / f"{trace}.jsonl.gz", "rt", encoding="utf-8") as lines:
                kept = list(lines)[:num_requests]
            (folder / f"{trace}.jsonl").write_text("".join(kept), encoding="utf-8")
        process = subprocess.Popen(
            [str(DYNAMO.python), str(Path(__file__).with_name("dynamo_replay.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield Peer(process, folder)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


def figures(quick: bool, traces: Path) -> list[Figure]:
    """Needs the peer installed (`benchmarks.peers`) and the Mooncake traces in `traces`. Raises
    FileNotFoundError if they are not there."""
    num_requests = 500 if quick else None
    num_repeats = 1 if quick else 3
    known = {name: read_trace(traces / f"{name}.jsonl.gz") for name in TRACES}
    if num_requests is not None:
        known = {name: trace.first(num_requests) for name, trace in known.items()}
    found: list[Figure] = []
    with peer(traces, num_requests) as theirs:
        for name in TRACES:
            found += _fidelity(theirs, Cell(trace=name, num_workers=4, speedup=1.0), known[name])
        for cell in CELLS[:1] if quick else CELLS:
            found += _comparison(theirs, cell, known[cell.trace], num_repeats)
        if not quick:
            found += _overload(theirs, known[OVERLOAD.trace], num_repeats)
    return found


def _fidelity(theirs: Peer, cell: Cell, trace: Trace) -> list[Figure]:
    """Exact on both sides, so one run each."""
    peer_says = theirs.play(cell, "round_robin")
    we_say = ours(
        cell, trace, prefill_policy="round-robin", decode_policy="round-robin", first_token_by="decode"
    )
    values = {
        "mean TTFT": (we_say.ttft_mean_s, peer_says.ttft_mean_s),
        "p99 TTFT": (we_say.ttft_p99_s, peer_says.ttft_p99_s),
        "hit ratio": (we_say.hit_ratio, peer_says.hit_ratio),
    }
    return [
        Figure(
            row="replay_fidelity",
            subject=f"{what}, {cell}, round robin: distance from dynamo.replay",
            unit="share",
            spread=_one(abs(ours_ / theirs_ - 1)),
            bar=Bar("<=", 0.03),
            note=f"{ours_:.4g} and {theirs_:.4g}",
        )
        for what, (ours_, theirs_) in values.items()
    ]


def _comparison(theirs: Peer, cell: Cell, trace: Trace, num_repeats: int) -> list[Figure]:
    kv_router = [theirs.play(cell, "kv_router") for _ in range(num_repeats)]
    found = [
        Figure(
            row="replay_peer",
            subject=f"dynamo kv_router, {cell}",
            unit="s mean TTFT",
            spread=over_repeats([run.ttft_mean_s for run in kv_router]),
            note=_told(kv_router),
        )
    ]
    for variant in VARIANTS:
        runs = [ours(cell, trace, seed=seed, **variant.settings) for seed in range(num_repeats)]
        found += _against(variant, cell, runs, kv_router)
        if variant.is_product and cell == CELLS[0]:
            found += _speed(cell, runs, kv_router)
    same = [
        ours(cell, trace, seed=seed, first_token_by="decode", **PRODUCT.settings)
        for seed in range(num_repeats)
    ]
    found.append(
        Figure(
            row="replay_ttft_mean_first_token_by_decode",
            subject=f"baton / dynamo kv_router, {cell}",
            unit="ratio",
            spread=_ratio([run.ttft_mean_s for run in same], [run.ttft_mean_s for run in kv_router]),
            note="not what Baton does: the first token by the decode worker, as in dynamo.replay",
        )
    )
    return found


def _against(variant: Variant, cell: Cell, runs: list[Outcome], kv_router: list[Outcome]) -> list[Figure]:
    subject = f"{variant.name} / dynamo kv_router, {cell}"
    is_judged = variant.is_product
    return [
        Figure(
            row="replay_ttft_mean",
            subject=subject,
            unit="ratio",
            spread=_ratio([run.ttft_mean_s for run in runs], [run.ttft_mean_s for run in kv_router]),
            bar=Bar("<=", 0.97) if is_judged else None,
            note=_told(runs),
        ),
        Figure(
            row="replay_ttft_p99",
            subject=subject,
            unit="ratio",
            spread=_ratio([run.ttft_p99_s for run in runs], [run.ttft_p99_s for run in kv_router]),
            bar=Bar("<=", 1.0) if is_judged else None,
        ),
        Figure(
            row="replay_goodput",
            subject=subject,
            unit="ratio",
            spread=_ratio([run.goodput for run in runs], [run.goodput for run in kv_router]),
            bar=Bar(">=", 1.0) if is_judged else None,
        ),
    ]


def _speed(cell: Cell, runs: list[Outcome], kv_router: list[Outcome]) -> list[Figure]:
    """Of the whole replay in one thread: policy, ledger and index included."""
    return [
        Figure(
            row="replay_speed",
            subject=f"{name}, {cell}",
            unit="requests per CPU second",
            spread=over_repeats([run.requests_per_cpu_s for run in outcomes]),
            bar=bar,
        )
        for name, outcomes, bar in (
            ("baton", runs, Bar(">=", 2000)),
            ("dynamo kv_router", kv_router, None),
        )
    ]


def _overload(theirs: Peer, trace: Trace, num_repeats: int) -> list[Figure]:
    """More than the fleet can take, and small caches: who waits where?"""
    kv_router = [theirs.play(OVERLOAD, "kv_router") for _ in range(num_repeats)]
    found = [
        Figure(
            row="replay_overload",
            subject=f"dynamo kv_router, {OVERLOAD}",
            unit="s p99 TPOT",
            spread=over_repeats([run.tpot_p99_s for run in kv_router]),
            note=_told(kv_router),
        )
    ]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("baton", PRODUCT.settings),
        ("baton --queue-timeout-s 2", PRODUCT.settings | {"queue_timeout_s": 2.0}),
    ]
    for name, changes in ways:
        runs = [ours(OVERLOAD, trace, seed=seed, **changes) for seed in range(num_repeats)]
        found += [
            Figure(
                row="replay_overload",
                subject=f"{name}, {OVERLOAD}",
                unit="s p99 TPOT",
                spread=over_repeats([run.tpot_p99_s for run in runs]),
                bar=Bar("<=", 0.2),
                note=_told(runs),
            ),
            Figure(
                row="replay_overload_goodput",
                subject=f"{name} / dynamo kv_router, {OVERLOAD}",
                unit="ratio",
                spread=_ratio([run.goodput for run in runs], [run.goodput for run in kv_router]),
            ),
        ]
    return found


def _ratio(ours_: list[float], theirs_: list[float]) -> Spread:
    """Of the medians, with the range of all pairs: seeds of one side have no partner on the other."""
    pairs = [a / b for a in ours_ for b in theirs_]
    return Spread(float(np.median(ours_) / np.median(theirs_)), min(pairs), max(pairs), len(ours_))


def _one(value: float) -> Spread:
    return Spread(value, value, value, 1)


def _told(runs: list[Outcome]) -> str:
    """Medians over the repeats."""
    ttft_mean, ttft_p99, tpot_mean, tpot_p99, hits, goodput, pace = (
        float(np.median([getattr(run, name) for run in runs]))
        for name in (
            "ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s", "hit_ratio", "goodput",
            "requests_per_cpu_s",
        )
    )  # fmt: skip
    return (
        f"TTFT {ttft_mean * 1e3:,.0f} / {ttft_p99 * 1e3:,.0f} ms mean / p99, "
        f"TPOT {tpot_mean * 1e3:.2f} / {tpot_p99 * 1e3:,.1f}, hits {hits:.1%}, good {goodput:.2%}, "
        f"{pace:,.0f} req/CPU-s"
    )
