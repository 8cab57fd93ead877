"""What the doors hand to the core, and what they hear back. Both doors use the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from baton.contract.messages import Placement, RequestReport, SequenceDelta
from baton.contract.sampling import SamplingSpec

OUR_MISTAKE = "internal error; the coordinator's log has the details"
"""All that a client hears of an exception that nobody foresaw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One sequence to generate, tokenised and checked by a door."""

    request_id: str
    """Unique among requests in flight; the doors make or check it."""
    prompt_token_ids: bytes
    """Packed, at least one token."""
    sampling: SamplingSpec


class ResultSink(Protocol):
    """Where the core delivers. Called on the event loop; must not block, raise or call back."""

    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None:
        """`placement` is complete enough for response headers from the first delta on."""

    def on_finished(self, report: RequestReport) -> None:
        """Exactly once, last, whatever happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFacts:
    """What a door must know to check a request before it costs anything."""

    is_ready: bool
    """At least one compatible prefill/decode pair is up and the coordinator is not draining."""
    why_not_ready: str | None = None
    """Who is missing, and who was refused."""
    model: str | None
    """The fleet's model path or name; None before the first worker registered."""
    max_model_len: int | None
    """Smallest of all registered workers."""


class Intake(Protocol):
    """The submit/abort calls that both doors share."""

    def submit(self, submission: Submission, sink: ResultSink) -> None:
        """Raises ServingError and accepts nothing (QueueFull, NoWorkers, Draining, PromptTooLong,
        DuplicateRequest); otherwise the sink will hear exactly one on_finished."""

    def abort(self, request_id: str) -> None:
        """The client left. Unknown ids are ignored; the sink still hears on_finished (aborted)."""

    def facts(self) -> FleetFacts: ...

    def snapshot(self) -> dict[str, object]:
        """Who is registered, how loaded, what is promised: JSON-ready, for people and checks."""
