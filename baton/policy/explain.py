"""A choice as a record: every fact the policy read, of every candidate, and the same choice again.

The record is plain JSON. It holds the policy's full name, the request, the draw and the facts by
name; terms (the ranking vectors) are added for the reader. `choose_again` needs no ledger and no
index: the policy ranks the recorded facts and the recorded draw settles what is tied, so a log
line answers "why this worker" long after the fleet has moved on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from baton.policy.base import Candidates, Choice, RequestFacts, choose
from baton.policy.registry import by_name


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
    assert choice is not None
    return choice


def table(recorded: dict[str, Any]) -> str:
    """For people: one row per candidate, facts and terms as columns, the chosen one marked."""
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


def _cell(value: float | bool) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def to_line(recorded: dict[str, Any]) -> str:
    return json.dumps(recorded, separators=(",", ":"))
