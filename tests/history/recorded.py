"""A run written as its clients, its fleet and its processes would write it. Imported, not collected."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from baton.contract.lifecycle import Outcome
from baton.contract.messages import PhaseTimes, Placement, RequestReport
from baton.history import Ask, Chunk, End, FleetSnapshot, Kill, Limits, RunWriter, Usage

START_S = float(int(time.time()) - 600)
"""Whole seconds: logs have milliseconds."""

GOLDEN = [104, 101, 108, 108, 111]
LIMITS = Limits(
    queue_s=10.0, prefill_s=10.0, handoff_s=10.0, stall_s=10.0, heartbeat_s=3.0, lease_s=5.0, max_attempts=2
)


def ask(request_id: str = "r1", **changes: Any) -> Ask:
    """Answered well within a second, five seconds into the run."""
    at_s = START_S + 5.0
    fields: dict[str, Any] = {
        "request_id": request_id,
        "job": request_id,
        "submitted_s": at_s - 0.001,
        "ended_s": at_s + 0.502,
        "end": End.COMPLETED,
        "num_prompt_tokens": 7,
        "max_tokens": 5,
        "golden": GOLDEN,
        "status": 200,
        "chunks": [
            Chunk(at_s + 0.1, 0, [104]),
            Chunk(at_s + 0.3, 1, [101, 108]),
            Chunk(at_s + 0.5, 3, [108, 111]),
        ],
        "num_ends": 1,
        "finish_reason": "length",
        "usage": Usage(7, 5),
        "phases": PHASES,
    }
    return Ask(**fields | changes)


PHASES = PhaseTimes(queue_s=0.02, prefill_s=0.08, handoff_s=0.1, decode_s=0.3)


def report(**changes: Any) -> RequestReport:
    fields: dict[str, Any] = {
        "outcome": Outcome.COMPLETED,
        "num_prompt_tokens": 7,
        "num_output_tokens": 5,
        "placement": Placement(prefill_worker="prefill-1", decode_worker="decode-1"),
        "phases": PHASES,
    }
    return RequestReport(**fields | changes)


def worker_snapshot(worker_id: str, **changes: Any) -> dict[str, Any]:
    num_used_blocks = changes.pop("num_used_blocks", 0)
    load = {"num_free_blocks": 64 - num_used_blocks, "num_running": 0, "num_waiting": 0}
    return {
        "worker_id": worker_id, "role": worker_id.partition("-")[0], "silent_s": 0.0, "num_legs": 0,
        "num_queued_tokens": 0, "num_reserved_blocks": 0, "capacity": {"num_blocks": 64}, "load": load,
    } | changes  # fmt: skip


def snapshot(*workers: dict[str, Any], at_s: float = 60.0, is_quiet: bool = True) -> FleetSnapshot:
    fleet = {
        "num_requests": 0,
        "num_queued": 0,
        "workers": list(workers) or [worker_snapshot("prefill-1"), worker_snapshot("decode-1")],
    }
    return FleetSnapshot(at_s=START_S + at_s, fleet=fleet, is_quiet=is_quiet)


@dataclass
class Log:
    """Of one process."""

    role: str
    lines: list[str] = field(default_factory=list)

    def say(self, at_s: float, text: str, level: str = "info") -> Log:
        """`at_s` from the start of the run."""
        at_s += START_S + 1e-6
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s)) + f".{int(at_s % 1 * 1000):03d}"
        self.lines.append(f"{clock} {level} {self.role} {text}")
        return self

    def finishes(
        self, at_s: float, request_id: str, handoff_id: str, report: RequestReport, whole_s: float = 0.5
    ) -> Log:
        line = {
            "event": "request finished", "request_id": request_id, "handoff_id": handoff_id,
            "whole_s": whole_s, "report": report,
        }  # fmt: skip
        return self.say(at_s, msgspec.json.encode(line).decode())


def coordinator_log(request_id: str = "r1", **changes: Any) -> Log:
    return (
        Log("coordinator")
        .say(0.0, "coordinator ready boot_id=abc pid=1")
        .say(5.0, f"request accepted request_id={request_id} num_prompt_tokens=7 max_tokens=5")
        .say(
            5.02,
            f"attempt started request_id={request_id} handoff_id=h1 prefill_worker=prefill-1 "
            "decode_worker=decode-1 way=disaggregated",
        )
        .say(5.2, f"decoding request_id={request_id} handoff_id=h1 decode_worker=decode-1")
        .finishes(5.5, request_id, "h1", report(**changes))
        .say(70.0, "coordinator stopped")
    )


def prefill_log() -> Log:
    return (
        Log("prefill")
        .say(0.1, "worker starting worker_id=prefill-1 boot_id=b1 pid=2")
        .say(5.021, "leg started handoff_id=h1 request_id=r1 num_prompt_tokens=7")
        .say(5.099, "leg finished handoff_id=h1 request_id=r1 leg_s=0.078 kv_bytes=1024")
    )


def decode_log() -> Log:
    return (
        Log("decode")
        .say(0.1, "worker starting worker_id=decode-1 boot_id=b2 pid=3")
        .say(5.11, "leg started handoff_id=h1 request_id=r1 num_prompt_tokens=8")
        .say(5.15, "kv not received handoff_id=h1 reason='late'", "warning")
        .say(5.499, "leg finished handoff_id=h1 request_id=r1 leg_s=0.389 finish_reason=length")
    )


def write_run(
    folder: Path,
    asks: list[Ask] | None = None,
    *,
    logs: dict[str, Log] | None = None,
    snapshots: list[FleetSnapshot] | None = None,
    kills: list[Kill] | None = None,
) -> Path:
    """What is not given is as in a run that went well."""
    with RunWriter(folder) as writer:
        writer.note(LIMITS)
        for each in [ask()] if asks is None else asks:
            writer.ask(each)
        for kill in kills or []:
            writer.note(kill)
        for found in [snapshot()] if snapshots is None else snapshots:
            writer.note(found)
    given = {"coordinator-0": coordinator_log(), "prefill-1-0": prefill_log(), "decode-1-0": decode_log()}
    for name, log in (given | (logs or {})).items():
        (folder / f"{name}.log").write_text("\n".join(["settings", *log.lines, ""]), encoding="utf-8")
    return folder
