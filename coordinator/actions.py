"""What the core asks its shell to do. The core itself does no I/O."""

from __future__ import annotations

from typing import Any

import msgspec

from baton.contract.messages import Message, Placement, RequestReport, SequenceDelta
from coordinator.intake import ResultSink


class Send(msgspec.Struct, frozen=True, gc=False):
    worker_id: str
    message: Message


class Deliver(msgspec.Struct, frozen=True, gc=False):
    sink: ResultSink
    delta: SequenceDelta
    placement: Placement


class Finish(msgspec.Struct, frozen=True, gc=False):
    sink: ResultSink
    request_id: str
    handoff_id: str
    report: RequestReport
    whole_s: float
    """Since its submission; measured apart from the report's phases, which must add up to it."""
    records: list[dict[str, Any]]
    """Its decisions, one per attempt; empty unless they are kept."""


Action = Send | Deliver | Finish
