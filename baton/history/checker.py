"""The promise as rules over a recorded run: facts in, violations out.

A rule never assumes that a record is there: an answer that no coordinator's log knows of is a violation
and not a request that was passed over.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from baton.contract.errors import ERROR_TYPES
from baton.contract.lifecycle import Outcome
from baton.contract.messages import PhaseTimes
from baton.history.facts import CoordinatorRecord, Finished, History
from baton.history.held import num_used_blocks, what_is_held
from baton.history.records import Ask, End, Limits

HTTP_CODES = frozenset(
    {
        "malformed_http", "invalid_api_key", "not_found", "method_not_allowed", "request_timeout",
        "body_too_large", "headers_too_large", "too_many_connections",
    }
)  # fmt: skip
"""Errors that only the HTTP door knows; the rest is `baton.contract.errors`."""

ERROR_CODES = frozenset(ERROR_TYPES) | HTTP_CODES

SUM_SLACK_S, SUM_SLACK_SHARE = 0.005, 0.02
"""What the sum of a request's phase times may differ from its whole time."""

ANSWERED = (End.COMPLETED, End.FAILED, End.REFUSED)
"""The client heard a final word."""


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    message: str
    request_id: str | None = None

    def __str__(self) -> str:
        whose = f"{self.request_id}: " if self.request_id else ""
        return f"{self.rule}: {whose}{self.message}"


Found = Iterator[tuple[str | None, str]]
"""(request id, what is wrong)"""


def check(history: History) -> list[Violation]:
    """All violations, rule by rule."""
    return [
        Violation(name, message, request_id)
        for name, rule in RULES.items()
        for request_id, message in rule(history)
    ]


# ── what a client heard ───────────────────────────────────────────────────────────────────────


def ends_once(history: History) -> Found:
    """Each accepted request ends exactly once, for its client and at its coordinator."""
    for ask in history.asks:
        if ask.end is End.HUNG:
            yield ask.request_id, f"no end after {ask.ended_s - ask.submitted_s:.1f} s"
        elif ask.end in ANSWERED and ask.num_ends != 1:
            yield ask.request_id, f"its client heard {ask.num_ends} final words"
        elif ask.end is End.CONNECTION_LOST and not history.had_no_coordinator(ask.submitted_s, ask.ended_s):
            yield ask.request_id, "its connection was lost although a coordinator lived all the time"
        if ask.num_late_events:
            yield ask.request_id, f"{ask.num_late_events} events after the final word"
    for coordinator in history.coordinators:
        for request_id, accepted in coordinator.accepted.items():
            num_words = len(coordinator.finished.get(request_id, ()))
            if num_words > len(accepted) or (coordinator.stopped_s and num_words < len(accepted)):
                yield (
                    request_id,
                    f"{coordinator.process} accepted it {len(accepted)} times and ended it {num_words} times",
                )
        for request_id in coordinator.finished.keys() - coordinator.accepted.keys():
            yield request_id, f"{coordinator.process} ended it and never accepted it"


def legs_end(history: History) -> Found:
    """Each leg that a worker began ends exactly once, unless the worker or its coordinator died."""
    for worker in history.workers:
        for request_id, handoff_id in worker.stray_ends:
            yield request_id, f"{worker.process} ended leg {handoff_id}, which it was not serving"
        if worker.stopped_s is not None:
            for handoff_id, request_id in worker.open_legs.items():
                yield request_id, f"{worker.process} stopped and had never ended leg {handoff_id}"


def outcomes_agree(history: History) -> Found:
    """What a client heard is what its coordinator recorded."""
    for ask in history.asks:
        if ask.end not in ANSWERED:
            continue
        word = history.finished(ask.request_id)
        is_completed = ask.end is End.COMPLETED
        if word is None:
            # One that was refused at the door was never accepted.
            if ask.end is not End.REFUSED:
                yield ask.request_id, f"{ask.end.value} for its client, and no coordinator's record of it"
        elif is_completed != (word.report.outcome is Outcome.COMPLETED):
            yield (
                ask.request_id,
                f"{ask.end.value} for its client, {word.report.outcome.value} for the coordinator",
            )


def token_order(history: History) -> Found:
    """No token index skipped or repeated."""
    for ask in history.asks:
        expected = 0
        for chunk in ask.chunks:
            if chunk.first_index != expected:
                yield ask.request_id, f"token {chunk.first_index} came where {expected} was due"
                break
            expected += len(chunk.token_ids)


def golden_text(history: History) -> Found:
    """The tokens of a greedy request are those of the undisturbed answer, as far as they got."""
    for ask in history.asks:
        if ask.golden is None:
            continue
        token_ids = ask.token_ids
        wrong = next((i for i, (a, b) in enumerate(zip(token_ids, ask.golden, strict=False)) if a != b), None)
        if wrong is not None:
            yield (
                ask.request_id,
                f"token {wrong} of {len(ask.golden)} is {token_ids[wrong]}, expected {ask.golden[wrong]}",
            )
        elif len(token_ids) > len(ask.golden) or (
            ask.end is End.COMPLETED and len(token_ids) < len(ask.golden)
        ):
            yield ask.request_id, f"{len(token_ids)} tokens, expected {len(ask.golden)}"


def tokens_billed(history: History) -> Found:
    """Tokens billed are tokens sent: to the client in `usage`, and in the coordinator's record."""
    for ask in history.asks:
        num_sent = len(ask.token_ids)
        if ask.end is End.COMPLETED:
            if ask.usage is None:
                yield ask.request_id, "completed without usage"
            elif (ask.usage.prompt_tokens, ask.usage.completion_tokens) != (
                ask.num_prompt_tokens,
                num_sent,
            ):
                yield (
                    ask.request_id,
                    f"usage says {ask.usage.prompt_tokens} + {ask.usage.completion_tokens} tokens, "
                    f"the client has {ask.num_prompt_tokens} + {num_sent}",
                )
        word = history.finished(ask.request_id)
        if word is None:
            continue
        num_billed = word.report.num_output_tokens
        # Who leaves may leave tokens unread, and an error instead of a whole answer replaces what there was
        # of it; nobody can have read more than was produced.
        has_all = ask.end in (End.COMPLETED, End.FAILED)
        is_right = num_billed == num_sent if has_all else num_billed >= num_sent
        if not is_right:
            yield ask.request_id, f"{num_billed} tokens billed, {num_sent} sent"


def error_codes(history: History) -> Found:
    """Every answer that is no answer says why, with a code of the list."""
    for ask in history.asks:
        is_error = ask.end in (End.FAILED, End.REFUSED) or (ask.status is not None and ask.status != 200)
        if is_error and (ask.error is None or ask.error.code not in ERROR_CODES):
            code = "no code" if ask.error is None else f"the code {ask.error.code!r}"
            yield ask.request_id, f"status {ask.status} with {code}, which is not in the list"


# ── time ──────────────────────────────────────────────────────────────────────────────────────


def phases_add_up(history: History) -> Found:
    """The sum of a request's phase times is its whole time, and the client was told the same."""
    for coordinator in history.coordinators:
        for request_id, words in coordinator.finished.items():
            for word in words:
                sum_s = _sum(word.report.phases)
                if abs(sum_s - word.whole_s) > max(SUM_SLACK_S, SUM_SLACK_SHARE * word.whole_s):
                    yield request_id, f"phases of {sum_s:.4f} s in a life of {word.whole_s:.4f} s"
    for ask in history.asks:
        if ask.phases is None:
            continue
        sum_s, whole_s = _sum(ask.phases), ask.ended_s - ask.submitted_s
        if sum_s > whole_s + max(SUM_SLACK_S, SUM_SLACK_SHARE * whole_s):
            yield ask.request_id, f"told phases of {sum_s:.4f} s, its client waited {whole_s:.4f} s"


def phase_deadlines(history: History) -> Found:
    """No request waits past the deadline of the phase it is in."""
    limits = history.limits
    if limits is None:
        return
    for coordinator in history.coordinators:
        for request_id, accepted in coordinator.accepted.items():
            words = coordinator.finished.get(request_id, [])
            yield from (
                (request_id, what) for what in _too_long(coordinator, request_id, accepted, words, limits)
            )
    for ask in history.asks:
        silence_s = _longest_silence_s(ask)
        if silence_s > longest_silence_s(limits):
            yield ask.request_id, f"its client heard nothing for {silence_s:.1f} s"


def longest_silence_s(limits: Limits) -> float:
    """A request that loses a worker in each attempt waits for every phase again."""
    attempt_s = limits.queue_s + limits.prefill_s + limits.handoff_s + limits.heartbeat_s
    return limits.stall_s + limits.max_attempts * attempt_s + limits.slack_s


def _too_long(
    coordinator: CoordinatorRecord,
    request_id: str,
    accepted: list[float],
    words: list[Finished],
    limits: Limits,
) -> Iterator[str]:
    starts = sorted([*coordinator.attempts.get(request_id, []), *(word.at_s for word in words)])
    for since_s in [*accepted, *coordinator.failed_attempts.get(request_id, [])]:
        until_s = next((at_s for at_s in starts if at_s >= since_s), since_s)
        if until_s - since_s > limits.queue_s + limits.slack_s:
            yield f"queued for {until_s - since_s:.1f} s, the deadline is {limits.queue_s:g} s"
    for word in words:
        phases = word.report.phases
        for name, took_s, limit_s in (
            ("prefilling", phases.prefill_s, limits.prefill_s),
            ("handing over", phases.handoff_s, limits.handoff_s),
        ):
            if took_s > limit_s + limits.heartbeat_s + limits.slack_s:
                yield f"{name} for {took_s:.1f} s, the deadline is {limit_s:g} s"


def _longest_silence_s(ask: Ask) -> float:
    heard = [ask.submitted_s, *(chunk.at_s for chunk in ask.chunks), ask.ended_s]
    return max(after - before for before, after in itertools.pairwise(heard))


def _sum(phases: PhaseTimes) -> float:
    return phases.queue_s + phases.prefill_s + phases.handoff_s + phases.decode_s


# ── what is held ──────────────────────────────────────────────────────────────────────────────


def nothing_held(history: History) -> Found:
    """After quiet time no worker holds a block, a leg or a promise."""
    quiet = [snapshot for snapshot in history.snapshots if snapshot.is_quiet]
    if not quiet:
        yield None, "nobody looked at the fleet after quiet time"
    for snapshot in quiet:
        for what in what_is_held(snapshot.fleet):
            yield None, f"after quiet time: {what}"


def leases(history: History) -> Found:
    """A prefill worker never holds a prompt past its lease."""
    limits = history.limits
    if limits is None:
        return
    for snapshot in history.snapshots:
        for worker in snapshot.fleet["workers"]:
            load = worker["load"]
            if worker["role"] != "prefill" or load["num_running"] or load["num_waiting"]:
                continue
            num_used = num_used_blocks(worker)
            ended_s = history.last_leg_end_s(worker["worker_id"], snapshot.at_s)
            # Its load is as old as its latest message.
            age_s = snapshot.at_s - worker["silent_s"] - ended_s
            if num_used and age_s > limits.lease_s + limits.slack_s:
                yield (
                    None,
                    f"{worker['worker_id']} holds {num_used} blocks {age_s:.1f} s after its last leg, "
                    f"the lease is {limits.lease_s:g} s",
                )


RULES: dict[str, Callable[[History], Found]] = {
    "ends once": ends_once,
    "legs end": legs_end,
    "outcomes agree": outcomes_agree,
    "token order": token_order,
    "golden text": golden_text,
    "tokens billed": tokens_billed,
    "nothing held": nothing_held,
    "phases add up": phases_add_up,
    "error codes": error_codes,
    "leases": leases,
    "phase deadlines": phase_deadlines,
}


def counts(violations: list[Violation]) -> Counter[str]:
    """By rule; every rule is there."""
    found = Counter(dict.fromkeys(RULES, 0))
    found.update(violation.rule for violation in violations)
    return found
