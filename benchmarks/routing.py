"""`bench.sh routing`: what a decision costs, whether work is shared evenly, and what real engines say.

    decision   one decision beside Dynamo's, in turns in the same run           routing_decision
    memory     resident memory under unique prefixes and changing workers       routing_memory
    balance    shares of work, real coordinator and simulated engines           routing_balance
    live       hits and times to first token on real vLLM engines               routing_live

`bench.sh replay`: what routing is worth, whole public traces in virtual time. Nothing in it is a matter of
this machine's speed, except how fast the replay itself is; it may run beside other work.

    replay     checks A4 to A10: every policy, per trace and load               routing_replay
    fidelity   our replay beside dynamo.replay, same traces and step times      replay_fidelity

`--rows` takes the beginnings of these names.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import (
    peers,
    replay_fidelity,
    routing_balance,
    routing_decision,
    routing_live,
    routing_memory,
    routing_replay,
)
from benchmarks.cpu_time import quiet_check
from benchmarks.figures import Report
from benchmarks.servers import NotReady

Part = Callable[[Report], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    decision_repeats: int
    decision_calls: int
    decision_cells: routing_decision.Cells
    memory_requests: int
    is_memory_judged: bool
    balance_repeats: int
    live: routing_live.Plan | None


FULL = Plan(
    decision_repeats=5,
    decision_calls=400,
    decision_cells=routing_decision.CELLS,
    memory_requests=1_200_000,
    is_memory_judged=True,
    balance_repeats=3,
    live=routing_live.FULL,
)
QUICK = Plan(
    decision_repeats=1,
    decision_calls=100,
    decision_cells=[(16, 64), (256, 64)],
    memory_requests=10_000,
    is_memory_judged=False,
    balance_repeats=1,
    live=None,
)


def run(plan: Plan, *, repeats: int | None, rows: Sequence[str] | None) -> Report:
    """`repeats` overrides those of decisions and balance, and the rounds of the live part."""
    live = plan.live
    if live is not None and repeats is not None:
        live = routing_live.Plan(rounds=repeats, num_sessions=live.num_sessions)
    parts: dict[str, Part] = {
        "decision": lambda report: routing_decision.measure(
            report,
            str(peers.DYNAMO.python),
            repeats=repeats or plan.decision_repeats,
            calls=plan.decision_calls,
            cells=plan.decision_cells,
        ),
        "memory": lambda report: routing_memory.measure(
            report, num_requests=plan.memory_requests, is_judged=plan.is_memory_judged
        ),
        "balance": lambda report: routing_balance.measure(report, repeats=repeats or plan.balance_repeats),
    }
    report = Report("routing")
    if live is not None:
        parts["live"] = lambda report: routing_live.measure(report, live)
    else:
        report.remarks.append("live: left out of a quick run, it needs real engines.")
    return _run_parts(report, parts, rows)


def run_replay(*, is_quick: bool, traces: Path, rows: Sequence[str] | None) -> Report:
    """Raises NotReady without the public traces."""
    if not traces.is_dir():
        raise NotReady(f"no public traces in {traces}; --traces DIR says where they are (docs/workloads.md)")
    parts: dict[str, Part] = {
        "replay": lambda report: report.figures.extend(routing_replay.figures(is_quick, traces)),
        "fidelity": lambda report: report.figures.extend(replay_fidelity.figures(is_quick, traces)),
    }
    return _run_parts(Report("replay"), parts, rows)


def _run_parts(report: Report, parts: dict[str, Part], rows: Sequence[str] | None) -> Report:
    for name, part in parts.items():
        if rows is not None and not any(name.startswith(row) for row in rows):
            continue
        report.busy_before[name] = quiet_check()
        start_s = time.monotonic()
        part(report)
        print(
            f"{report.benchmark}: {name} took {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True
        )
    return report
