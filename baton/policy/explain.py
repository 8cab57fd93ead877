"""Decisions as records: every fact that was read, of every candidate, and the same decision again.

A record is plain JSON. Of each choice it holds the policy's full name, the request, the draw and the
facts by name; terms (the ranking vectors) are added for the reader. `choose_again` needs no ledger
and no index: the policy ranks the recorded facts and the recorded draw settles what is tied, so a
log line answers "why this worker" long after the fleet has moved on. Of stay-or-go it holds the
question, the costs, and the fleet's pace at that moment where that is a few coefficients; of a larger
step-time model it holds the costs that it answered, as facts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from baton.contract.lifecycle import Way
from baton.policy.base import Candidates, Choice, RequestFacts, choose
from baton.policy.decision import Decision, way_of
from baton.policy.registry import by_name
from baton.policy.stay_or_go import Costs, Pace, Question, Rest, costs
from baton.step_time.linear import LinearStepTime

ALWAYS_READ = ("hit_tokens", "num_queued_tokens", "num_legs", "num_kv_tokens")
"""Facts that are recorded whether the policy reads them or not: the reader will ask."""


def read_all(candidates: Candidates) -> None:
    """Before the choice is committed, which changes them."""
    for name in ALWAYS_READ:
        getattr(candidates, name)


# ── one choice ────────────────────────────────────────────────────────────────────────────────


def record(choice: Choice, worker_id_of: Callable[[int], str]) -> dict[str, Any]:
    """Call before anything is forgotten; the facts themselves do not change later."""
    candidates = choice.candidates
    return {
        "policy": choice.policy,
        "num_prompt_tokens": candidates.facts.num_prompt_tokens,
        "num_expected_output_tokens": candidates.facts.num_expected_output_tokens,
        "now_s": candidates.now_s,
        "draw": candidates.draw,
        "workers": [worker_id_of(int(slot)) for slot in candidates.slots],
        "slots": candidates.slots.tolist(),
        "facts": {name: values.tolist() for name, values in candidates.read.items()},
        "terms": [key.tolist() for key in choice.keys],
        "chosen": worker_id_of(choice.slot),
        "position": choice.position,
        "num_tied": choice.num_tied,
    }


def choose_again(recorded: dict[str, Any]) -> Choice:
    """The recorded decision, made again. Raises ValueError for an unknown policy."""
    facts = RequestFacts(
        num_prompt_tokens=recorded["num_prompt_tokens"],
        num_expected_output_tokens=recorded["num_expected_output_tokens"],
    )
    slots = np.array(recorded["slots"], dtype=np.int64)
    candidates = Candidates(facts, None, slots, draw=recorded["draw"], now_s=recorded["now_s"])
    for name, values in recorded["facts"].items():
        vector = np.array(values)
        candidates.given(name, lambda vector=vector: vector)  # type: ignore[misc]
    choice = choose(by_name(recorded["policy"]), candidates)
    if choice is None:
        raise ValueError("the record has no candidates")
    return choice


def differences(recorded: dict[str, Any], name: str) -> list[str]:
    """What deciding again gives instead of what was recorded; empty: the same."""
    again = choose_again(recorded)
    found = {
        "position": again.position,
        "chosen": recorded["workers"][again.position],
        "num_tied": again.num_tied,
        "terms": [key.tolist() for key in again.keys],
    }
    return [
        f"{name}: {field} is {recorded[field]!r}, deciding again gives {value!r}"
        for field, value in found.items()
        if value != recorded[field]
    ]


# ── a whole decision ──────────────────────────────────────────────────────────────────────────

CHOICES = ("decode", "prefill", "unguarded", "colocated")


def record_decision(decision: Decision, worker_id_of: Callable[[int], str]) -> dict[str, Any]:
    guarded, asked = decision.prefill or decision.colocated, decision.stay_or_go
    choices = {
        "decode": decision.decode,
        "prefill": decision.prefill.choice if decision.prefill is not None else None,
        "unguarded": guarded.unguarded if guarded is not None and guarded.is_diverted else None,
        "colocated": decision.colocated.choice if decision.colocated is not None else None,
    }
    recorded: dict[str, Any] = {"handoff_id": decision.handoff_id}
    recorded |= {name: record(choice, worker_id_of) for name, choice in choices.items() if choice is not None}
    if asked is not None:
        recorded["stay_or_go"] = {
            "question": dataclasses.asdict(asked.question),
            "pace": _record_pace(asked.pace),
            "costs": dataclasses.asdict(asked.costs),
        }
    if decision.is_recomputed:
        recorded["is_recomputed"] = True
    if decision.not_asked:
        recorded["not_asked"] = decision.not_asked
    if decision.left_out:
        recorded["left_out"] = decision.left_out
    return recorded | _outcome(recorded)


def _record_pace(pace: Pace) -> dict[str, Any] | None:
    if isinstance(pace.prefill, LinearStepTime) and isinstance(pace.decode, LinearStepTime):
        return dataclasses.asdict(pace)
    return None


def _costs_again(asked: dict[str, Any]) -> dict[str, Any]:
    """The costs that the recorded pace gives, or those recorded where the pace was not."""
    question, pace = asked["question"], asked["pace"]
    if pace is None:
        return dataclasses.asdict(Costs(**asked["costs"]))
    steps = {phase: LinearStepTime(**pace[phase]) for phase in ("prefill", "decode")}
    rests = {side: Rest(**question[side]) for side in ("there", "prefill")}
    return dataclasses.asdict(costs(Question(**question | rests), Pace(**pace | steps)))


def _outcome(recorded: dict[str, Any]) -> dict[str, Any]:
    """What the choices of a record come to."""
    both = recorded.get("colocated")
    prefill, decode = ((recorded.get(name) or both or {}).get("chosen") for name in ("prefill", "decode"))
    asked = recorded.get("stay_or_go")
    if recorded.get("is_recomputed"):
        prefill = None
    costs_found = Costs(**asked["costs"]) if asked is not None else None
    way, reason = way_of(prefill, decode, costs_found, recorded.get("not_asked"))
    serves = {"prefill": decode if way is Way.STAYED else prefill, "decode": decode}
    return {"way": way.value, "reason": reason, "serves": serves}


def decide_again(recorded: dict[str, Any]) -> list[str]:
    """The differences to the record; empty: the same decision. A record that lacks a field, or holds
    nonsense, is a difference too."""
    try:
        found = [
            line
            for name in CHOICES
            if recorded.get(name) is not None
            for line in differences(recorded[name], name)
        ]
        if (asked := recorded.get("stay_or_go")) is not None and _costs_again(asked) != asked["costs"]:
            found.append(
                f"stay_or_go: costs are {asked['costs']!r}, asking again gives {_costs_again(asked)!r}"
            )
        return found + [
            f"{field} is {recorded[field]!r}, deciding again gives {value!r}"
            for field, value in _outcome(recorded).items()
            if recorded[field] != value
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return [f"the record cannot be decided again: {type(error).__name__}: {error}"]


# ── for people ────────────────────────────────────────────────────────────────────────────────


def table(recorded: dict[str, Any]) -> str:
    """One row per candidate, facts and terms as columns, the chosen one marked."""
    names = [*recorded["facts"], *(f"key{i + 1}" for i in range(len(recorded["terms"])))]
    columns = [*recorded["facts"].values(), *recorded["terms"]]
    rows = [["", "worker", *names]]
    for position, worker in enumerate(recorded["workers"]):
        mark = ">" if position == recorded["position"] else ""
        rows.append([mark, worker, *(_cell(column[position]) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    tied = f", {recorded['num_tied']} tied" if recorded["num_tied"] > 1 else ""
    lines.append(
        f"{recorded['policy']}: {recorded['chosen']} for {recorded['num_prompt_tokens']} tokens{tied}"
    )
    return "\n".join(lines)


def story(recorded: dict[str, Any]) -> str:
    """All of a decision: the way and why, each choice's table, both sides of stay-or-go."""
    serves = recorded["serves"]
    parts = [
        f"{recorded['way']}: {recorded['reason']}; prefill {serves['prefill'] or 'none'}, "
        f"decode {serves['decode'] or 'none'}"
    ]
    titles = {
        "decode": "decode, among workers with room",
        "prefill": "prefill, among workers with room",
        "unguarded": "without the hotspot guard, which took this favourite out",
        "colocated": "one worker for both phases",
    }
    parts += [f"{titles[name]}\n{table(recorded[name])}" for name in CHOICES if recorded.get(name)]
    for worker, reason in recorded.get("left_out", {}).items():
        parts.append(f"left out: {worker}, {reason}")
    if (asked := recorded.get("stay_or_go")) is not None:
        parts.append(_stay_or_go(asked["question"], Costs(**asked["costs"])))
    return "\n\n".join(parts)


def _stay_or_go(question: dict[str, Any], found: Costs) -> str:
    there, prefill = question["there"], question["prefill"]
    return "\n".join(
        (
            "stay or go, in request-seconds",
            f"stay {found.stay_s:.6f} = queue {found.stay_queue_s:.6f} + step {found.stay_step_s:.6f} "
            f"+ harm {found.stay_harm_s:.6f}   ({there['num_hit_tokens']} of "
            f"{question['num_prompt_tokens']} tokens held, {question['num_decodes']} sequences decoding)",
            f"go   {found.go_s:.6f} = queue {found.go_queue_s:.6f} + compute {found.go_compute_s:.6f} "
            f"+ hand-off {found.go_handoff_s:.6f}   ({prefill['num_hit_tokens']} tokens held, "
            f"{prefill['num_queued_tokens']} queued, {question['num_bytes_to_move']} bytes to move)",
        )
    )


def _cell(value: float | bool) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
