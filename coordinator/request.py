"""One request in the coordinator: its state, its current attempt, and when each phase began."""

from __future__ import annotations

from typing import Any

from baton.contract.errors import ServingError
from baton.contract.lifecycle import Outcome, RequestState, Way, WorkerRole, check_move
from baton.contract.messages import (
    KvSource,
    PhaseTimes,
    Placement,
    RequestReport,
    SequenceDelta,
    TokenLogprobs,
)
from baton.contract.tokens import num_token_ids
from baton.policy.router import KnownHits
from coordinator.first_token import reason_for_decode
from coordinator.intake import ResultSink, Submission


class Request:
    """Owned by the core; moves only along LEGAL_MOVES."""

    __slots__ = (
        "deadline_s", "decode_worker", "dispatched_s", "entered_s", "first_decode_s", "first_token_by",
        "first_token_reason", "given_delta", "handoff_id", "hit_tokens", "hits", "is_alone", "is_streamed",
        "kv_source",
        "last_decode_worker", "last_prefill_worker", "num_attempts", "num_bytes_to_move",
        "num_output_tokens", "num_prompt_tokens", "placement", "predicted_hit_tokens", "prefill_finished_s",
        "prefill_worker", "progress_s", "prompt_logprobs", "prompt_token_ids", "records", "sink", "state",
        "submission", "submitted_s", "way", "way_reason",
    )  # fmt: skip

    def __init__(self, submission: Submission, sink: ResultSink, now_s: float) -> None:
        self.submission = submission
        self.sink = sink
        self.state = RequestState.QUEUED
        self.num_prompt_tokens = num_token_ids(submission.prompt_token_ids)
        self.num_output_tokens = 0
        self.num_attempts = 0
        self.handoff_id = ""
        """Names the current attempt; empty before the first."""
        self.prefill_worker: str | None = None
        """Worker of this attempt that still has something of ours; None: nobody, or let go."""
        self.decode_worker: str | None = None
        self.last_prefill_worker: str | None = None
        self.last_decode_worker: str | None = None
        self.kv_source: KvSource | None = None
        self.prompt_token_ids: bytes | None = None
        """What the decode worker continues from; set once the prompt has been computed."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.first_token_by = WorkerRole.PREFILL
        self.first_token_reason = ""
        self.hits: KnownHits | None = None
        """Who holds how much of the prompt, when last asked; kept for its hashes."""
        self.predicted_hit_tokens: int | None = None
        """Of the worker that computes the prompt, in the last attempt; None: nothing was known."""
        self.hit_tokens: int | None = None
        """What that worker's engine found; None: it did not say, or not yet."""
        self.is_alone = False
        """No other prompt was waiting at the worker that computes this one."""
        self.is_streamed = False
        """In this attempt the decode worker was told when the prefill began; KV moves meanwhile."""
        self.given_delta: SequenceDelta | None = None
        """In this attempt the client has this first token of the prefill worker, and the decode worker will
        tell it again."""
        self.num_bytes_to_move = 0
        """KV that the decode worker did not hold when it was chosen."""
        self.way: Way | None = None
        self.way_reason: str | None = None
        self.records: list[dict[str, Any]] = []
        """One decision per attempt, where decisions are recorded."""
        self.placement = Placement()
        self.submitted_s = self.progress_s = self.entered_s = now_s
        service = submission.sampling.service
        within_s = None if service is None else service.deadline_s
        self.deadline_s = None if within_s is None else now_s + within_s
        """When the whole answer is wanted."""
        self.dispatched_s: float | None = None
        self.prefill_finished_s: float | None = None
        self.first_decode_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.submission.request_id

    @property
    def needs_decode(self) -> bool:
        return self.submission.sampling.max_tokens > 1

    def is_late(self, now_s: float) -> bool:
        """It waits for a worker, and nothing of it has been sent that could still be of use."""
        return (
            self.deadline_s is not None
            and now_s >= self.deadline_s
            and self.state is RequestState.QUEUED
            and not self.num_output_tokens
        )

    @property
    def is_prefilled_elsewhere(self) -> bool:
        """A prefill worker is at work; the decode worker has not heard of this request."""
        return (
            self.state is RequestState.PREFILLING and self.prefill_worker is not None and not self.is_streamed
        )

    def move(self, state: RequestState, now_s: float) -> None:
        """Raises IllegalMove and changes nothing if the table does not list the move."""
        check_move(self.state, state)
        self.state = state
        self.progress_s = self.entered_s = now_s

    def begin_attempt(
        self,
        handoff_id: str,
        *,
        prefill_worker: str | None,
        decode_worker: str | None,
        way: Way,
        way_reason: str,
        stream: KvSource | None = None,
    ) -> None:
        """A worker that is None has no part in this attempt; the same one twice serves both phases."""
        is_on_one_worker = prefill_worker == decode_worker
        self.num_attempts += 1
        self.is_streamed = stream is not None
        self.given_delta = None
        self.handoff_id = handoff_id
        self.way, self.way_reason = way, way_reason
        self.prefill_worker = None if is_on_one_worker else prefill_worker
        self.decode_worker = decode_worker
        self.last_prefill_worker = prefill_worker or self.last_prefill_worker
        self.last_decode_worker = decode_worker or self.last_decode_worker
        if prefill_worker is not None:
            self._choose_first_token(is_on_one_worker=is_on_one_worker, stream=stream)
        self.update_placement()

    def _choose_first_token(self, *, is_on_one_worker: bool, stream: KvSource | None) -> None:
        reason = "one worker for both phases" if is_on_one_worker else None
        reason = reason or reason_for_decode(self.submission.sampling, is_streamed=stream is not None)
        if reason is None and stream is not None and not stream.has_first_token:
            reason = "streamed"  # its prompt left before there was a token to append
        self.first_token_by = WorkerRole.PREFILL if reason is None else WorkerRole.DECODE
        self.first_token_reason = reason or "ready when prefill ends"

    def update_placement(self) -> None:
        self.placement = Placement(
            prefill_worker=self.last_prefill_worker,
            decode_worker=self.last_decode_worker if self.needs_decode else None,
            way=self.way,
            way_reason=self.way_reason,
            first_token_by=self.first_token_by,
            first_token_reason=self.first_token_reason,
            num_attempts=max(1, self.num_attempts),
            predicted_hit_tokens=self.predicted_hit_tokens,
            hit_tokens=self.hit_tokens,
        )

    def phases(self, now_s: float) -> PhaseTimes:
        """Consecutive spans of the last attempt, so that they add up to now - submitted."""
        marks = [self.dispatched_s, self.prefill_finished_s, self.first_decode_s]
        spans = []
        start_s = self.submitted_s
        for mark in marks:
            end_s = now_s if mark is None else mark
            spans.append(end_s - start_s)
            start_s = end_s
        spans.append(now_s - start_s)
        return PhaseTimes(queue_s=spans[0], prefill_s=spans[1], handoff_s=spans[2], decode_s=spans[3])


def final_report(
    request: Request,
    outcome: Outcome,
    now_s: float,
    last: SequenceDelta | None,
    error: ServingError | None,
) -> RequestReport:
    was_moved = request.first_decode_s is not None and request.kv_source is not None
    return RequestReport(
        outcome=outcome,
        error=error.report() if error is not None else None,
        finish_reason=last.finish_reason if last is not None else None,
        stop_reason=last.stop_reason if last is not None else None,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        num_cached_tokens=request.hit_tokens or 0,
        kv_bytes=request.kv_source.num_bytes if was_moved and request.kv_source else 0,
        placement=request.placement,
        phases=request.phases(now_s),
        prompt_logprobs=request.prompt_logprobs,
    )
