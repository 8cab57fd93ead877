"""`bench.sh preemption`, rows `fleet`: requests within an SLO per second of whole fleets, 1P1D.

Two fleets of real vLLM engines on CPU stand side by side, each with a coordinator, a prefill worker and a
decode worker of four places; they differ in the decode worker's scheduler alone, and only one is given work
at a time. Each seed's trace is played on both, in turns. Its rate is set from what the first come, first
served fleet can do right before, and both get the same arrivals.

The SLO: end-to-end seconds per output token are at most `SLO_SCALE` times the median that the trace's
first requests have one at a time on an idle fleet.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from baton.workload import SingleTurnWorkload, Trace, parse_lengths
from benchmarks import fleets
from benchmarks.figures import Bar, Figure, Report
from benchmarks.live_fleet import LiveFleet
from benchmarks.samples import paired_ratios, percentile, spread
from benchmarks.trace_load import Answered, play

SLO_SCALE = 5.0
LOAD = 1.0
MIN_RATIO = 1.3
NUM_PLACES = 4
NUM_ALONE = 30
ENGINE = ("--max-model-len", 1024, "--kv-cache-gib", 0.5)
PROMPT, OUTPUT = "uniform:16,40", "lognormal:48,1.8,max=600"
CAPACITY_REQUESTS, CAPACITY_TOKENS = 64, 64


@dataclass(frozen=True, slots=True)
class Plan:
    num_seeds: int
    num_requests: int


FULL = Plan(num_seeds=3, num_requests=400)


@dataclass(slots=True)
class Rounds:
    """Of one scheduler, one value per seed."""

    per_s: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    mean_s: list[float] = field(default_factory=list)
    normalised_s: list[float] = field(default_factory=list)
    p99_s: list[float] = field(default_factory=list)

    def add(self, answers: Sequence[Answered], slo_s: float) -> None:
        normalised = [answer.e2e_s / answer.num_output_tokens for answer in answers]
        num_within = sum(value <= slo_s for value in normalised)
        first_s = min(answer.sent_s for answer in answers)
        last_s = max(answer.sent_s + answer.e2e_s for answer in answers)
        self.per_s.append(num_within / (last_s - first_s))
        self.share.append(num_within / len(answers))
        self.mean_s.append(statistics.fmean(answer.e2e_s for answer in answers))
        self.normalised_s.append(statistics.fmean(normalised))
        self.p99_s.append(percentile([answer.e2e_s for answer in answers], 0.99))


def trace_of(seed: int, num_requests: int, tokens_per_s: float, load: float = LOAD) -> Trace:
    """Of short prompts and heavy-tailed answers, so many tokens a second as `load` says."""

    def drawn(rate_per_s: float) -> Trace:
        return SingleTurnWorkload(
            num_requests=num_requests,
            rate_per_s=rate_per_s,
            prompt=parse_lengths(PROMPT),
            output=parse_lengths(OUTPUT),
        ).generate(seed)

    # Lengths do not depend on the rate, and gaps only shrink with it.
    once = drawn(1.0)
    return drawn(load * tokens_per_s * float(once.arrival_s[-1]) / float(once.num_output_tokens.sum()))


def measure(report: Report, policy: str, plan: Plan = FULL) -> None:
    model = fleets.demo_model()
    found = {"fcfs": Rounds(), policy: Rounds()}
    capacities: list[float] = []
    slos: list[float] = []
    with ExitStack() as stack:
        address: dict[str, str] = {}
        for scheduler in found:
            fleet = stack.enter_context(LiveFleet(f"preemption-{scheduler}"))
            fleet.start_coordinator()
            fleet.start_worker("prefill", "prefill-1", "--model", model, *ENGINE)
            # One after the other: together they would share the cores and take longer.
            fleet.wait_until_registered()
            fleet.start_worker(
                "decode", "decode-1", "--model", model, *ENGINE,
                "--max-batch-size", NUM_PLACES, "--scheduler", scheduler,
            )  # fmt: skip
            fleet.wait_until_ready()
            address[scheduler] = fleet.address
            # First requests load kernels and shake hands.
            play(fleet.address, _together(8, 16), salt=1)
        for seed in range(plan.num_seeds):
            capacities.append(_capacity(address["fcfs"], salt=1_000 * (seed + 1)))
            trace = trace_of(seed, plan.num_requests, capacities[-1])
            alone = play(
                address["fcfs"], trace.first(NUM_ALONE), loop="one at a time", salt=1_000 * (seed + 1) + 1
            )
            slos.append(
                SLO_SCALE * statistics.median(answer.e2e_s / answer.num_output_tokens for answer in alone)
            )
            turns = list(found.items()) if seed % 2 == 0 else list(reversed(found.items()))
            for number, (scheduler, rounds) in enumerate(turns):
                answers = play(address[scheduler], trace, salt=1_000 * (seed + 1) + 2 + number)
                rounds.add(answers, slos[-1])
                print(
                    f"fleet: seed {seed}, {scheduler}: {rounds.share[-1]:.0%} within {1e3 * slos[-1]:.1f} ms "
                    f"per token, mean {rounds.mean_s[-1]:.2f} s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    _figures(report, policy, found, capacities, slos, plan)


def _together(num_requests: int, num_tokens: int) -> Trace:
    return SingleTurnWorkload(
        num_requests=num_requests,
        rate_per_s=1e6,
        prompt=parse_lengths("fixed:32"),
        output=parse_lengths(f"fixed:{num_tokens}"),
    ).generate(seed=1)


def _capacity(address: str, salt: int) -> float:
    """Output tokens per second with all places taken: equal answers, so that no tail leaves places empty."""
    answers = play(address, _together(CAPACITY_REQUESTS, CAPACITY_TOKENS), salt=salt)
    first_s = min(answer.sent_s + answer.ttft_s for answer in answers)
    last_s = max(answer.sent_s + answer.e2e_s for answer in answers)
    return CAPACITY_REQUESTS * CAPACITY_TOKENS / (last_s - first_s)


def _figures(
    report: Report,
    policy: str,
    found: dict[str, Rounds],
    capacities: list[float],
    slos: list[float],
    plan: Plan,
) -> None:
    stock, ours = found["fcfs"], found[policy]
    report.figures += [
        Figure(
            row="fleet_within_slo", subject=f"{policy} / fcfs", unit="x",
            spread=spread(paired_ratios(ours.per_s, stock.per_s)), bar=Bar(">=", MIN_RATIO),
            note=f"requests per second within {SLO_SCALE:g} x the unloaded seconds per output token, load "
            f"{LOAD:g}, {plan.num_requests} requests a seed",
        ),
        *(
            Figure(
                row="fleet_share_within_slo", subject=name, unit="of requests", spread=spread(rounds.share)
            )
            for name, rounds in found.items()
        ),
        *(
            Figure(row="fleet_within_slo", subject=name, unit="requests/s", spread=spread(rounds.per_s))
            for name, rounds in found.items()
        ),
    ]  # fmt: skip
    for row, theirs, mine in (
        ("fleet_mean", stock.mean_s, ours.mean_s),
        ("fleet_normalised", stock.normalised_s, ours.normalised_s),
        ("fleet_p99", stock.p99_s, ours.p99_s),
    ):
        ratios = spread(paired_ratios(theirs, mine))
        report.figures.append(Figure(row=row, subject=f"fcfs / {policy}", unit="x", spread=ratios))
    report.figures += [
        Figure(row="fleet_capacity", subject="fcfs", unit="tokens/s", spread=spread(capacities)),
        Figure(row="fleet_slo", subject="both", unit="ms/token", spread=spread([1e3 * slo for slo in slos])),
    ]
