"""`bench.sh twin`: do replay, simulated engines and real engines tell the same story?

    virtual    `baton.replay` in virtual time beside simulated engines behind the real coordinator, the
               same step times, the same requests: what sockets, timers and the coordinator add
    slow       the same, all times four times as long: what is left then is not latency of this machine
    vllm       vLLM on CPU, 1P1D, measured before and after conversations on it; then the same on simulated
               engines with the fitted step times, and in a replay with them

A figure is the mean over the requests of one run; deviations are judged. All workers pull KV: a replay's
hand-off begins when the prefill is over. Real time runs at the speed of this machine: on a busy one the
simulated engines and vLLM are late, the replay never is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from baton.replay import FleetShape, ReplaySettings, replay
from baton.simulation import SimulatedWorkerSettings
from baton.step_time import KvLink, LinearStepTime
from baton.workload import SessionWorkload, Trace, parse_lengths
from benchmarks import fleets
from benchmarks.cpu_time import quiet_check
from benchmarks.figures import Bar, Figure, Report
from benchmarks.live_fleet import LiveFleet
from benchmarks.measured_pace import MeasuredPace, fit_pace, observe
from benchmarks.samples import Spread, spread
from benchmarks.trace_load import Answered, play

BLOCK = 32
VIRTUAL_TOLERANCE_PERCENT = 10.0
VLLM_TOLERANCE_PERCENT = 25.0
HIT_TOLERANCE_POINTS = 2.0
KV_BYTES_PER_TOKEN = 1
"""The measured hand-off counts tokens, so the replay does."""

REPLAY, SIMULATED, VLLM = "replay", "simulated engines", "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    repeats: int
    num_sessions: int
    has_vllm: bool


FULL = Plan(repeats=3, num_sessions=80, has_vllm=True)
QUICK = Plan(repeats=1, num_sessions=25, has_vllm=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run."""

    ttft_ms: float
    tpot_ms: float
    hit_percent: float
    """Of prompt tokens."""
    num_stayed: int
    """Requests whose prompt the decode worker computed."""
    served: tuple[tuple[int, int, float], ...]
    """Of each request, in order: tokens of its prompt found cached, who computed it (0 prefill, 1 decode
    worker), time to its first token in ms."""


def run(plan: Plan, *, repeats: int | None, rows: Sequence[str] | None) -> Report:
    report = Report("twin")
    parts: dict[str, Callable[[], None]] = {
        "virtual": lambda: _virtual(report, "virtual", plan, repeats or plan.repeats)
    }
    if plan.has_vllm:
        parts["slow"] = lambda: _virtual(report, "slow", plan, 1, SLOWER)
        parts["vllm"] = lambda: _vllm(report)
    else:
        report.remarks.append("slow, vllm: left out of a quick run; vllm needs real engines.")
    for name, part in parts.items():
        if rows is None or any(name.startswith(row) for row in rows):
            report.busy_before[name] = quiet_check()
            start_s = time.monotonic()
            part()
            print(f"twin: {name} took {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)
    return report


# ── virtual time beside real time ────────────────────────────────────────────────────────────────

PREFILL = LinearStepTime(base_s=0.01, per_prefill_token_s=1e-4)
DECODE = LinearStepTime(base_s=0.015, per_decode_s=2e-4, per_context_token_s=1e-7, per_prefill_token_s=1e-4)
TRANSFER_S = 0.01
NUM_BLOCKS = 2048
SLOWER = 4.0


def _virtual(report: Report, row: str, plan: Plan, repeats: int, slower: float = 1.0) -> None:
    """4P4D, open loop, about half load, caches that hold a part of the conversations."""
    found: dict[str, list[Outcome]] = {REPLAY: [], SIMULATED: []}
    prefill, decode = (_slower(step_time, slower) for step_time in (PREFILL, DECODE))
    transfer_s = TRANSFER_S * slower
    with LiveFleet(f"twin-{row}") as fleet:
        common = ("--engine", "simulated", "--num-blocks", NUM_BLOCKS, "--max-model-len", 16_384,
                  "--max-batch-size", 64, "--max-num-batched-tokens", 2048, "--transfer", "pull")  # fmt: skip
        fleet.start_worker(
            "prefill", "p", *common, "--simulated-step-time", as_text(prefill), "--simulated-transfer-s",
            transfer_s, num_workers=4,
        )  # fmt: skip
        fleet.start_worker("decode", "d", *common, "--simulated-step-time", as_text(decode), num_workers=4)
        for seed in range(repeats):
            # As a replay does, each run starts with a coordinator that has yet to learn the pace.
            fleet.stop_coordinator()
            fleet.start_coordinator()
            fleet.wait_until_ready()
            trace = SessionWorkload(
                num_sessions=plan.num_sessions,
                session_rate_per_s=2.5,
                num_apps=8,
                mean_think_s=3.0,
                answer=parse_lengths("lognormal:60,0.7,max=300"),
                max_model_len=8192,
                block_size_tokens=BLOCK,
            ).generate(seed=seed)
            trace = replace(trace, arrival_s=trace.arrival_s * slower)
            found[SIMULATED].append(_observed(play(fleet.address, trace, salt=seed)))
            found[REPLAY].append(
                _replayed(
                    trace,
                    FleetShape(4, 4),
                    prefill,
                    decode,
                    KvLink(bytes_per_s=1e12, latency_s=transfer_s),
                    max_batch_size=64,
                    is_closed_loop=False,
                )
            )
    _compare(report, row, found, REPLAY, VIRTUAL_TOLERANCE_PERCENT)
    report.figures += _alike(row, found[REPLAY], found[SIMULATED])


def _slower(step_time: LinearStepTime, factor: float) -> LinearStepTime:
    terms = ("base_s", "per_prefill_token_s", "per_prefill_pair_s", "per_decode_s", "per_context_token_s")
    return replace(step_time, **{term: getattr(step_time, term) * factor for term in terms})


def _alike(row: str, replayed: Sequence[Outcome], live: Sequence[Outcome]) -> list[Figure]:
    """What is left where both did the same: sockets, timers, and whoever else wanted the processors."""
    shares, lates = [], []
    for virtual, real in zip(replayed, live, strict=True):
        pairs = list(zip(virtual.served, real.served, strict=True))
        late = [there[2] - here[2] for here, there in pairs if here[:2] == there[:2]]
        shares.append(100 * len(late) / len(pairs))
        lates.append(median(late))
    subject = f"{SIMULATED} and {REPLAY}"
    return [
        Figure(row=f"{row}_alike", subject=subject, unit="%", spread=spread(shares),
               note="of requests: as much found cached, by the same kind of worker"),
        Figure(row=f"{row}_alike_late", subject=subject, unit="ms", spread=spread(lates),
               note="by which the first token of these comes later in real time, median of each run"),
    ]  # fmt: skip


def as_text(step_time: LinearStepTime) -> str:
    """As `--simulated-step-time` takes it."""
    return (
        f"linear:base_s={step_time.base_s!r},per_prefill_token_s={step_time.per_prefill_token_s!r},"
        f"per_prefill_pair_s={step_time.per_prefill_pair_s!r},per_decode_s={step_time.per_decode_s!r},"
        f"per_context_token_s={step_time.per_context_token_s!r}"
    )


def _replayed(
    trace: Trace,
    shape: FleetShape,
    prefill: LinearStepTime,
    decode: LinearStepTime,
    link: KvLink,
    *,
    max_batch_size: int,
    is_closed_loop: bool,
    prefill_window_tokens: int | None = None,
) -> Outcome:
    result = replay(
        trace,
        ReplaySettings(
            fleet=shape,
            worker=SimulatedWorkerSettings(
                num_blocks=NUM_BLOCKS,
                block_size_tokens=BLOCK,
                max_batch_size=max_batch_size,
                max_num_batched_tokens=2048,
            ),
            prefill_time=prefill,
            decode_time=decode,
            link=link,
            kv_bytes_per_token=KV_BYTES_PER_TOKEN,
            prefill_window_tokens=prefill_window_tokens,
            is_closed_loop=is_closed_loop,
        ),
    )
    return Outcome(
        fmean(result.ttft_s.tolist()) * 1e3,
        fmean(result.tpot_s.tolist()) * 1e3,
        result.hit_ratio * 100,
        result.num_stayed,
        tuple(
            zip(
                result.num_cached_tokens.tolist(),
                result.is_stay.astype(int).tolist(),
                (result.ttft_s * 1e3).tolist(),
                strict=True,
            )
        ),
    )


def _observed(answers: Sequence[Answered]) -> Outcome:
    placements = [answer.report.placement for answer in answers]
    is_stay = [place.prefill_worker in (None, place.decode_worker) for place in placements]
    return Outcome(
        fmean(answer.ttft_s for answer in answers) * 1e3,
        fmean(answer.tpot_s for answer in answers if answer.num_output_tokens > 1) * 1e3,
        sum(place.hit_tokens or 0 for place in placements)
        / sum(answer.report.num_prompt_tokens for answer in answers)
        * 100,
        sum(is_stay),
        tuple(
            (place.hit_tokens or 0, int(stay), answer.ttft_s * 1e3)
            for place, stay, answer in zip(placements, is_stay, answers, strict=True)
        ),
    )


# ── real engines ─────────────────────────────────────────────────────────────────────────────────

VLLM_ENGINE = (
    "--max-model-len", 4096, "--kv-cache-gib", 0.5, "--max-batch-size", 32, "--max-num-batched-tokens", 2048,
    "--transfer", "pull",
)  # fmt: skip
VLLM_WINDOW_TOKENS = 512
"""What a prefill worker on CPU asks for."""


def _vllm(report: Report) -> None:
    trace = SessionWorkload(
        num_sessions=20,
        session_rate_per_s=1.0,
        num_apps=3,
        system_prompt=parse_lengths("uniform:300,600"),
        question=parse_lengths("lognormal:400,0.6,max=1000"),
        answer=parse_lengths("uniform:16,48"),
        mean_turns=4.0,
        mean_think_s=1.0,
        max_model_len=4000,
        block_size_tokens=BLOCK,
    ).generate(seed=3)
    found: dict[str, list[Outcome]] = {}
    with LiveFleet("twin-vllm") as fleet:
        fleet.start_coordinator()
        model = fleets.demo_model()
        for role in ("prefill", "decode"):
            fleet.start_worker(role, f"{role}-1", "--model", model, *VLLM_ENGINE)
        fleet.wait_until_ready()
        play(fleet.address, trace.first(6), salt=1)  # the first requests load kernels and shake hands
        before = observe(fleet.address, number=0)
        found[VLLM] = [_observed(play(fleet.address, trace, loop="closed", salt=2))]
        pace = fit_pace([before, observe(fleet.address, number=1)])
    _tell(report, pace)
    with LiveFleet("twin-fitted") as fleet:
        fleet.start_coordinator()
        common = ("--engine", "simulated", "--num-blocks", NUM_BLOCKS, "--max-model-len", 4096,
                  "--max-batch-size", 32, "--max-num-batched-tokens", 2048, "--transfer", "pull")  # fmt: skip
        fleet.start_worker(
            "prefill", "p", *common, "--simulated-step-time", as_text(pace.prefill),
            "--prefill-window-tokens", VLLM_WINDOW_TOKENS,
            "--simulated-transfer-s", pace.handoff.transfer_s(float(trace.num_prompt_tokens.mean())),
        )  # fmt: skip
        fleet.start_worker("decode", "d", *common, "--simulated-step-time", as_text(pace.decode))
        fleet.wait_until_ready()
        found[SIMULATED] = [_observed(play(fleet.address, trace, loop="closed", salt=2))]
    found[REPLAY] = [
        _replayed(
            trace,
            FleetShape(1, 1),
            pace.prefill,
            pace.decode,
            pace.handoff,
            max_batch_size=32,
            is_closed_loop=True,
            prefill_window_tokens=VLLM_WINDOW_TOKENS,
        )
    ]
    _compare(report, "vllm", found, VLLM, VLLM_TOLERANCE_PERCENT)


def _tell(report: Report, pace: MeasuredPace) -> None:
    report.remarks.append(
        f"vllm: fitted prefill step {as_text(pace.prefill)}, decode step {as_text(pace.decode)}, hand-off "
        f"{pace.handoff.latency_s * 1e3:.2f} ms + {1e6 / pace.handoff.bytes_per_s:.3f} us a token."
    )


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def _compare(
    report: Report, row: str, found: dict[str, list[Outcome]], reference: str, tolerance_percent: float
) -> None:
    """Everybody's means, and how far each is from the reference run by run."""
    columns = (
        ("mean_ttft", "ttft_ms", "ms"),
        ("mean_tpot", "tpot_ms", "ms"),
        ("hit_share", "hit_percent", "%"),
    )
    for label, field, unit in columns:
        values = {name: [float(getattr(outcome, field)) for outcome in runs] for name, runs in found.items()}
        for name, numbers in values.items():
            report.figures.append(
                Figure(row=f"{row}_{label}", subject=name, unit=unit, spread=spread(numbers))
            )
        for name, numbers in values.items():
            if name == reference:
                continue
            pairs = list(zip(numbers, values[reference], strict=True))
            is_share = unit == "%"
            deviations = [abs(a - b) if is_share else abs(a / b - 1) * 100 for a, b in pairs]
            report.figures.append(
                Figure(
                    row=f"{row}_{label}_deviation",
                    subject=f"{name} from {reference}",
                    unit="points" if is_share else "%",
                    spread=spread(deviations),
                    bar=Bar("<=", HIT_TOLERANCE_POINTS if is_share else tolerance_percent),
                )
            )
    for name, runs in found.items():
        num_stayed = float(sum(outcome.num_stayed for outcome in runs))
        if num_stayed:
            report.figures.append(
                Figure(
                    row=f"{row}_stayed",
                    subject=name,
                    unit="requests",
                    spread=Spread(num_stayed, num_stayed, num_stayed, 1),
                    note="computed by their decode worker",
                )
            )
