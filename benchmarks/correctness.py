"""No wrong text: what is asked of a fleet, answered by one engine alone, and compared.

Rows:

    late_read   leases shorter than the time until somebody reads, freed blocks written over at once; our
                connector by each way and policy, and vLLM's own beside it (`late_read.py`)
    golden      golden prompts between thousands of others, through a whole fleet (`cross_talk.py`)
    canary      prompts with canaries, all at once, through a whole fleet
    digest      signed KV: unique prompts at once without a false alarm, and planted corruptions caught
    faults      every sixteenth transfer goes wrong; both in `transfer_faults.py`

Counts, not times: a busy machine does not change what is right. "Different" is an answer that came
without an error and is not the one of an engine alone, which is greedy in float32.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from baton.contract.sampling import SamplingSpec
from benchmarks import cross_talk, late_read, transfer_faults
from benchmarks.cpu_time import quiet_check
from benchmarks.cross_talk import Question
from benchmarks.figures import Bar, Figure, Report
from benchmarks.fleets import demo_model
from benchmarks.live_fleet import LiveFleet
from benchmarks.samples import spread
from tests.engine.pair import EnginePair

GOLDEN_EVERY = 10
GOLDEN_CONCURRENCY = 24
ANSWERS_AT_ONCE = 64
NONE = Bar("<=", 0.0)

WORKER_FLAGS = (
    "--max-model-len", 1024, "--kv-cache-gib", 0.25, "--max-num-batched-tokens", 256,
    "--max-batch-size", 32,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    num_late_reads: int
    """Of each way and policy."""
    has_peers: bool
    """vLLM's own connector, and the engines with the other policy."""
    num_golden: int
    num_requests: int
    """In which the golden ones are asked."""
    num_canaries: int
    transfers: tuple[late_read.Way, ...]
    """Of the fleets."""
    num_unique: int
    """Signed prompts at once."""
    num_planted: int
    """Corruptions of each kind and way."""
    num_faulty: int
    """Requests of each way and policy, while transfers fail."""


FULL = Plan(
    num_late_reads=500, has_peers=True, num_golden=50, num_requests=2000, num_canaries=240,
    transfers=("pull", "stream"), num_unique=240, num_planted=50, num_faulty=240,
)  # fmt: skip
QUICK = Plan(
    num_late_reads=24, has_peers=False, num_golden=5, num_requests=50, num_canaries=24,
    transfers=("stream",), num_unique=0, num_planted=0, num_faulty=0,
)  # fmt: skip

ROWS = ("late_read", "golden", "canary", "digest", "faults")


def run(plan: Plan, *, rows: Sequence[str] | None) -> Report:
    report = Report("correctness")
    chosen = {row for row in ROWS if rows is None or row.startswith(tuple(rows))}
    report.busy_before["all"] = quiet_check()
    if chosen & {"late_read", "golden", "canary"}:
        _compare_answers(report, plan, chosen)
    if plan.num_faulty:
        _judge_faulty_transfers(report, plan, chosen)
    return report


def _compare_answers(report: Report, plan: Plan, chosen: set[str]) -> None:
    golden = cross_talk.golden_questions(plan.num_golden) if "golden" in chosen else []
    canaries = cross_talk.canary_questions(plan.num_canaries) if "canary" in chosen else []
    pair = late_read.start_pair(demo_model(), transfer="stream")
    try:
        expected = _alone(pair, [*golden, *canaries])
        if "late_read" in chosen:
            prompts = late_read.random_prompts(plan.num_late_reads, seed=1)
            right = _late_answers_alone(pair, prompts)
            for way in ("pull", "stream"):
                _judge_late_reads(report, pair, f"{way}, fail", way, prompts, right)
    finally:
        pair.close()
    if "late_read" in chosen:
        if plan.has_peers:
            _late_reads_of_others(report, prompts, right)
        report.remarks.append(
            f"late_read: leases of {late_read.LEASE_S} s, asked for up to {late_read.LONGEST_DELAY_S:g} s "
            f"late, {late_read.POOL_BLOCKS} blocks on the prefill engine, {late_read.CONCURRENCY} at once."
        )
    if golden or canaries:
        for transfer in plan.transfers:
            _judge_fleet(report, plan, transfer, golden, canaries, expected)


def _judge_faulty_transfers(report: Report, plan: Plan, chosen: set[str]) -> None:
    if not chosen & {"digest", "faults"}:
        return
    for policy in ("fail", "recompute"):
        pair = transfer_faults.start_pair(demo_model(), policy)
        try:
            if "digest" in chosen and policy == "fail":
                transfer_faults.judge_digest(report, pair, plan.num_unique, plan.num_planted)
            if "faults" in chosen:
                transfer_faults.judge_faults(report, pair, policy, plan.num_faulty)
        finally:
            pair.close()
    if "digest" in chosen:
        transfer_faults.judge_rate(report)
    report.remarks.append(
        "faults: every sixteenth transfer is, in turn, refused, failed after its bytes have moved, stuck "
        "for ever, or told late."
    )


# ── late reads ───────────────────────────────────────────────────────────────────────────────


def _late_reads_of_others(report: Report, prompts: list[list[int]], right: list[list[int]]) -> None:
    recompute = {"kv_load_failure_policy": "recompute"}
    pair = late_read.start_pair(demo_model(), transfer="stream", decode=recompute)
    try:
        for way in ("pull", "stream"):
            _judge_late_reads(report, pair, f"{way}, recompute", way, prompts, right)
    finally:
        pair.close()
    pair = late_read.start_pair(demo_model(), is_stock=True)
    try:
        _judge_late_reads(report, pair, "vLLM's NixlConnector", "pull", prompts, right)
    finally:
        pair.close()


def _late_answers_alone(pair: EnginePair, prompts: list[list[int]]) -> list[list[int]]:
    return [
        answer
        for first in range(0, len(prompts), ANSWERS_AT_ONCE)
        for answer in pair.run(
            late_read.answers_alone(pair, prompts[first : first + ANSWERS_AT_ONCE]), timeout_s=300.0
        )
    ]


def _judge_late_reads(
    report: Report,
    pair: EnginePair,
    subject: str,
    way: late_read.Way,
    prompts: list[list[int]],
    right: list[list[int]],
) -> None:
    pair.run(pair.forget_prefixes())
    verdicts = pair.run(late_read.late_reads(pair, way, prompts, right, subject), timeout_s=1200.0)
    pair.run(pair.wait_until_free(10.0 * late_read.LEASE_S), timeout_s=60.0)
    is_ours = subject.startswith(way)
    is_failing = subject.endswith("fail")
    num_answered = verdicts.num_equal if not is_failing else verdicts.num_equal + verdicts.errors.total()
    _count(report, "late_read_asked", subject, verdicts.num_requests)
    _count(report, "late_read_late", subject, verdicts.num_late)
    _count(
        report, "late_read_different", subject, verdicts.num_different, NONE if is_ours else Bar(">=", 1.0)
    )
    _count(report, "late_read_errors", subject, verdicts.errors.total())
    if is_ours:
        wanted = Bar(">=", float(len(prompts)))
        _count(report, "late_read_right", subject, num_answered, wanted, "equal, or the policy's typed error")


# ── fleets ───────────────────────────────────────────────────────────────────────────────────


def _alone(pair: EnginePair, questions: Sequence[Question]) -> dict[Question, list[int]]:
    expected: dict[Question, list[int]] = {}
    for first in range(0, len(questions), ANSWERS_AT_ONCE):
        some = questions[first : first + ANSWERS_AT_ONCE]
        samplings: list[SamplingSpec] = [question.sampling for question in some]
        prompts = [question.prompt for question in some]
        answers = pair.run(late_read.answers_alone(pair, prompts, samplings), timeout_s=300.0)
        expected |= dict(zip(some, answers, strict=True))
    return expected


def _judge_fleet(
    report: Report,
    plan: Plan,
    transfer: str,
    golden: Sequence[Question],
    canaries: Sequence[Question],
    expected: dict[Question, list[int]],
) -> None:
    with ExitStack() as stack:
        fleet = stack.enter_context(LiveFleet(f"correctness-{transfer}"))
        fleet.start_coordinator()
        flags = ("--model", demo_model(), "--transfer", transfer, *WORKER_FLAGS)
        for role in ("prefill", "decode"):
            fleet.start_worker(role, role, *flags)
        fleet.wait_until_ready()
        if golden:
            questions = cross_talk.interleaved(golden, plan.num_requests, golden_every=GOLDEN_EVERY)
            verdicts = _asked(fleet, questions, expected, GOLDEN_CONCURRENCY)
            _judge_answers(report, "golden", transfer, verdicts, len(questions))
        if canaries:
            verdicts = _asked(fleet, canaries, expected, len(canaries))
            _judge_answers(report, "canary", transfer, verdicts, len(canaries))
            _count(report, "canary_foreign", transfer, verdicts.num_foreign, NONE)


def _asked(
    fleet: LiveFleet, questions: Sequence[Question], expected: dict[Question, list[int]], concurrency: int
) -> cross_talk.Verdicts:
    return asyncio.run(cross_talk.ask_all(fleet.address, questions, expected, concurrency=concurrency))


def _judge_answers(
    report: Report, row: str, transfer: str, verdicts: cross_talk.Verdicts, num_asked: int
) -> None:
    _count(report, f"{row}_asked", transfer, num_asked)
    _count(report, f"{row}_equal", transfer, verdicts.num_equal)
    _count(report, f"{row}_different", transfer, verdicts.num_different, NONE)
    _count(report, f"{row}_errors", transfer, verdicts.errors.total(), NONE)


def _count(
    report: Report, row: str, subject: str, number: int, bar: Bar | None = None, note: str = ""
) -> None:
    report.figures.append(
        Figure(row=row, subject=subject, unit="requests", spread=spread([float(number)]), bar=bar, note=note)
    )
