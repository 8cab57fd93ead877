"""One decision about one attempt: which choices it was made of, and which way that means.

    decode, prefill     chosen each from its pool; on two workers: a hand-off, unless staying is cheaper
                        (which may be so while no prefill worker has room)
    colocated           chosen once, where all workers serve both phases
    decode alone        the prompt was computed before and its KV is lost
    prefill alone       the first token is the whole answer

`way_of` is the whole rule. It runs when the decision is made, and again when a record of it is
replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.contract.lifecycle import Way
from baton.policy.base import Choice
from baton.policy.router import PrefillChoice
from baton.policy.stay_or_go import Costs, Pace, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class StayOrGo:
    question: Question
    pace: Pace
    costs: Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """With every fact that was read; for the log, so only made where there is one."""

    handoff_id: str
    prefill: PrefillChoice | None = None
    decode: Choice | None = None
    colocated: PrefillChoice | None = None
    is_recomputed: bool = False
    """`colocated` chose a worker for a prompt that had been computed before."""
    stay_or_go: StayOrGo | None = None
    not_asked: str | None = None
    """Why stay-or-go was no question."""
    left_out: dict[str, str] | None = None
    """Workers of the asked pools that could not take this request, and why."""


def way_of(
    prefill_worker: str | None, decode_worker: str | None, stay_or_go: Costs | None, not_asked: str | None
) -> tuple[Way, str]:
    """(the way, why). The workers are those chosen for each phase; None: nobody was, or had room."""
    if decode_worker is None:
        return Way.PREFILL_ONLY, "one token was asked for"
    if stay_or_go is not None and stay_or_go.stays:
        return Way.STAYED, "computing the rest there costs less than a hand-off"
    if prefill_worker is None:
        return Way.RECOMPUTED, "the KV computed before was lost"
    if prefill_worker == decode_worker:
        return Way.COLOCATED, "both phases fell to one worker"
    if stay_or_go is None:
        return Way.DISAGGREGATED, not_asked or "two workers"
    return Way.DISAGGREGATED, "a hand-off costs no more than computing the rest there"
