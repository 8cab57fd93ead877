"""`bench.sh routing`, rows `live`: hits and times to first token on real engines.

Two prefill workers and one decode worker, vLLM on CPU with the demo model, and conversations whose
prompts contain everything before. The workers stay, their coordinator is replaced between rounds:
product, round robin, product, … Each round has prompts of its own, so that no cache helps the next.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from statistics import fmean

from baton.workload import SessionWorkload, Trace, parse_lengths
from benchmarks import fleets
from benchmarks.figures import Bar, Figure, Report
from benchmarks.live_fleet import LiveFleet
from benchmarks.samples import Spread, paired_ratios, spread
from benchmarks.trace_load import Answered, play

MIN_EQUAL_PERCENT = 99.0
PRODUCT, ROUND_ROBIN = "lmetric", "round-robin"
ENGINE = (
    "--max-model-len", 4096, "--kv-cache-gib", 0.5, "--max-batch-size", 32, "--max-num-batched-tokens", 2048,
)  # fmt: skip
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int
    num_sessions: int


FULL = Plan(rounds=5, num_sessions=14)


def sessions(plan: Plan) -> Trace:
    return SessionWorkload(
        num_sessions=plan.num_sessions,
        session_rate_per_s=1.0,
        num_apps=14,
        system_prompt=parse_lengths("uniform:1800,2400"),
        question=parse_lengths("lognormal:150,0.5,max=400"),
        answer=parse_lengths("uniform:8,24"),
        mean_turns=6.0,
        mean_think_s=0.4,
        max_model_len=4000,
        block_size_tokens=BLOCK,
    ).generate(seed=7)


def measure(report: Report, plan: Plan = FULL) -> None:
    trace = sessions(plan)
    found: dict[str, list[list[Answered]]] = {PRODUCT: [], ROUND_ROBIN: []}
    model = fleets.demo_model()
    with LiveFleet("routing-live") as fleet:
        for role, name in (("prefill", "prefill-1"), ("prefill", "prefill-2"), ("decode", "decode-1")):
            fleet.start_worker(role, name, "--model", model, *ENGINE)
        for number in range(-1, plan.rounds):
            for policy, runs in found.items():
                fleet.start_coordinator("--prefill-policy", policy)
                fleet.wait_until_ready()
                salt = 1 + 2 * (number + 1) + (policy == PRODUCT)
                if number < 0:
                    # First requests load kernels and shake hands.
                    play(fleet.address, trace.first(8), loop="closed", salt=salt)
                else:
                    runs.append(play(fleet.address, trace, loop="closed", salt=salt))
                fleet.stop_coordinator()
            print(f"live: round {number + 1} of {plan.rounds}", file=sys.stderr, flush=True)
    _hits(report, found)
    _times(report, found, len(trace))


def _hits(report: Report, found: dict[str, list[list[Answered]]]) -> None:
    for policy, runs in found.items():
        placements = [answer.report.placement for run in runs for answer in run]
        equal = sum(place.predicted_hit_tokens == place.hit_tokens for place in placements)
        share = equal / len(placements) * 100
        report.figures.append(
            Figure(
                row="live_hits_predicted_exactly",
                subject=policy,
                unit="%",
                spread=Spread(share, share, share, 1),
                bar=Bar(">=", MIN_EQUAL_PERCENT),
                note=f"{equal} of {len(placements)} requests, engine's own count",
            )
        )
        shares = [
            sum(answer.report.placement.hit_tokens or 0 for answer in run)
            / sum(answer.report.num_prompt_tokens for answer in run)
            for run in runs
        ]
        report.figures.append(
            Figure(row="live_hit_share", subject=policy, unit="of prompt tokens", spread=spread(shares))
        )


def _times(report: Report, found: dict[str, list[list[Answered]]], num_requests: int) -> None:
    means = {
        policy: [fmean(answer.ttft_s for answer in run) * 1e3 for run in runs]
        for policy, runs in found.items()
    }
    for policy, values in means.items():
        report.figures.append(
            Figure(row="live_mean_ttft", subject=policy, unit="ms", spread=spread(values),
                   note=f"{num_requests} requests a round")
        )  # fmt: skip
    report.figures.append(
        Figure(
            row="live_mean_ttft_ratio",
            subject=f"{PRODUCT} / {ROUND_ROBIN}",
            unit="x",
            spread=spread(paired_ratios(means[PRODUCT], means[ROUND_ROBIN])),
            bar=Bar("<=", 1.0),
            note="rounds in turns, the same requests",
        )
    )
