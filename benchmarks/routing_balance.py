"""`bench.sh routing`, rows `balance`: is work shared evenly by the real coordinator?

Real processes and sockets, simulated engines. Each row's figure is the largest deviation of any
worker's share from the mean, or for the stuck worker its share of the requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from baton.workload import HotspotWorkload, SingleTurnWorkload, Trace, parse_lengths
from benchmarks.figures import Bar, Figure, Report
from benchmarks.live_fleet import LiveFleet
from benchmarks.samples import spread
from benchmarks.servers import cpu_seconds
from benchmarks.trace_load import Answered, Loop, play

MAX_DEVIATION_PERCENT = 20.0
MAX_STUCK_PERCENT = 5.0
ENGINE = (
    "--engine",
    "simulated",
    "--num-blocks",
    "8192",
    "--max-model-len",
    "8192",
    "--max-batch-size",
    "128",
)
FAST = ("--simulated-step-time", "linear:base_s=0.001,per_prefill_token_s=2e-6,per_decode_s=1e-5")
SLOW = ("--simulated-step-time", "linear:base_s=0.002,per_prefill_token_s=1e-4,per_decode_s=1e-5")
"""10,000 prompt tokens a second."""


def measure(report: Report, *, repeats: int) -> None:
    with LiveFleet("balance") as fleet:
        fleet.start_coordinator()
        fleet.start_worker("prefill", "p", *ENGINE, *FAST, num_workers=8)
        fleet.start_worker("decode", "d", *ENGINE, *FAST, num_workers=5)
        fleet.wait_until_ready()
        paced, burst = _single_turn(448, output="4"), _single_turn(512, output="lognormal:48,0.8,max=200")
        _row(report, fleet, "one_in_flight", paced, "one at a time", repeats, {"prefill": 8, "decode": 5})
        _row(report, fleet, "512_concurrent", burst, "open", repeats, {"decode": 5})
    with LiveFleet("balance-shared") as fleet:
        fleet.start_coordinator()
        fleet.start_worker("prefill", "p", *ENGINE, *SLOW, num_workers=8)
        fleet.start_worker("decode", "d", *ENGINE, *FAST, num_workers=8)
        fleet.wait_until_ready()
        # Eight workers could compute 156 such requests a second once all hold the system prompt.
        _row(
            report, fleet, "shared_system_prompt", _shared(512), "open", repeats, {"prefill": 8, "decode": 8}
        )
    _stuck(report, repeats)
    _many_workers(report)


def _single_turn(num_requests: int, *, output: str) -> Trace:
    return SingleTurnWorkload(
        num_requests=num_requests,
        rate_per_s=10_000.0,
        prompt=parse_lengths("lognormal:200,0.5,max=1000"),
        output=parse_lengths(output),
    ).generate(seed=1)


def _shared(num_requests: int) -> Trace:
    """All open with the same 1,024 tokens; 512 of their own."""
    return HotspotWorkload(
        rate_per_s=100.0,
        duration_s=num_requests / 100,
        prompt=parse_lengths("fixed:1536"),
        output=parse_lengths("fixed:8"),
        hot_share=1.0,
        hot_hit=1024 / 1536,
    ).generate(seed=1)


def _row(
    report: Report,
    fleet: LiveFleet,
    name: str,
    trace: Trace,
    loop: Loop,
    repeats: int,
    num_workers: dict[str, int],
) -> None:
    runs = [play(fleet.address, trace, loop=loop, salt=salt) for salt in range(repeats)]
    for role, count in num_workers.items():
        deviations = [_deviation_percent(answers, role, count) for answers in runs]
        report.figures.append(
            Figure(
                row=f"balance_{name}",
                subject=f"{role}, {count} workers",
                unit="%",
                spread=spread(deviations),
                bar=Bar("<=", MAX_DEVIATION_PERCENT),
                note=f"largest deviation from the mean of {len(trace) / count:.0f} requests a worker",
            )
        )


def _deviation_percent(answers: Sequence[Answered], role: str, num_workers: int) -> float:
    served = Counter(getattr(answer.report.placement, f"{role}_worker") for answer in answers)
    counts = np.array([*served.values(), *[0] * (num_workers - len(served))])
    return float(np.abs(counts / counts.mean() - 1).max() * 100)


def _stuck(report: Report, repeats: int) -> None:
    """One of eight prefill workers takes prompts and computes nothing. Its prompts are tried again
    elsewhere after the phase's deadline, so whoever needed a second attempt had been given to it."""
    shares = []
    for repeat in range(repeats):
        with LiveFleet("balance-stuck") as fleet:
            # The stuck one would not pass its join test: it is to be one that broke later.
            fleet.start_coordinator("--prefill-timeout-s", 8, "--no-join-test")
            fleet.start_worker("prefill", "p", *ENGINE, *SLOW, num_workers=7)
            fleet.start_worker("prefill", "stuck", *ENGINE, *SLOW, "--simulated-fault", "prefill:stall")
            fleet.start_worker("decode", "d", *ENGINE, *FAST, num_workers=4)
            fleet.wait_until_ready()
            trace = SingleTurnWorkload(
                num_requests=600,
                rate_per_s=100.0,
                prompt=parse_lengths("fixed:512"),
                output=parse_lengths("fixed:4"),
            ).generate(seed=repeat)
            answers = play(fleet.address, trace)
        given = sum(answer.report.placement.num_attempts > 1 for answer in answers)
        shares.append(given / len(answers) * 100)
    report.figures.append(
        Figure(
            row="balance_stuck_worker",
            subject="share of 600 requests given to it",
            unit="%",
            spread=spread(shares),
            bar=Bar("<=", MAX_STUCK_PERCENT),
            note="one of 8 prefill workers; an equal share would be 12.5 %",
        )
    )


def _many_workers(report: Report) -> None:
    """128 prefill and 128 decode workers in four processes: what 256 cost the coordinator."""
    with LiveFleet("balance-256") as fleet:
        fleet.start_coordinator()
        for number in range(2):
            fleet.start_worker("prefill", f"p{number}", *ENGINE, *SLOW, num_workers=64)
            fleet.start_worker("decode", f"d{number}", *ENGINE, *FAST, num_workers=64)
        fleet.wait_until_ready()
        trace = SingleTurnWorkload(
            num_requests=3000,
            rate_per_s=200.0,
            prompt=parse_lengths("lognormal:600,0.5,max=4000"),
            output=parse_lengths("fixed:4"),
        ).generate(seed=1)
        before = cpu_seconds([fleet.coordinator])
        answers = play(fleet.address, trace)
        cpu_ms = (cpu_seconds([fleet.coordinator]) - before) / len(answers) * 1e3
    end_s = max(answer.sent_s + answer.e2e_s for answer in answers)
    note = f"{len(answers)} requests in {end_s:.1f} s, {trace.rate_per_s:.0f} a second offered, 4 tokens each"
    report.figures.append(
        Figure(
            row="balance_256_workers",
            subject="coordinator's CPU per request",
            unit="ms",
            spread=spread([cpu_ms]),
            note=note + ", heartbeats of all workers included",
        )
    )
    for role in ("prefill", "decode"):
        report.figures.append(
            Figure(
                row="balance_256_workers",
                subject=f"{role}, 128 workers",
                unit="%",
                spread=spread([_deviation_percent(answers, role, 128)]),
                note=f"largest deviation from the mean of {len(answers) / 128:.0f} requests a worker",
            )
        )
