"""One request in the coordinator: its state, the tokens its client has, its current attempt, and when
each phase began."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from baton.contract.errors import ServingError
from baton.contract.lifecycle import Outcome, RequestState, Transfer, Way, WorkerRole, check_move
from baton.contract.messages import (
    KvSource,
    PhaseTimes,
    Placement,
    RequestReport,
    SequenceDelta,
    TokenLogprobs,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import num_token_ids, pack_token_ids
from baton.policy.router import KnownHits
from coordinator.first_token import reason_for_decode
from coordinator.intake import ResultSink, Submission


class Request:
    """Owned by the core; moves only along LEGAL_MOVES."""

    __slots__ = (
        "deadline_s", "decode_worker", "dispatched_s", "entered_s", "first_decode_s", "first_token_by",
        "early_deltas", "first_token_reason", "given_delta", "handoff_id", "hit_tokens", "hits", "is_alone",
        "is_recomputed", "is_streamed", "kv_source", "last_decode_worker", "last_error",
        "last_prefill_worker", "next_token_by", "num_attempts", "num_bytes_moved", "num_bytes_to_move",
        "num_fruitless_attempts", "num_given_tokens", "num_prefilled_tokens", "num_prompt_tokens",
        "num_resumes", "output_token_ids", "placement", "predicted_hit_tokens", "prefill_finished_s",
        "prefill_worker", "progress_s", "prompt_computed_s", "prompt_logprobs", "pull_reason", "records",
        "sink", "started_s", "state", "submission", "submitted_s", "unwanted_workers", "way", "way_reason",
    )  # fmt: skip

    def __init__(self, submission: Submission, sink: ResultSink, now_s: float) -> None:
        self.submission = submission
        self.sink = sink
        self.state = RequestState.QUEUED
        self.num_prompt_tokens = num_token_ids(submission.prompt_token_ids)
        self.output_token_ids = array("I")
        """All that the client was given, four bytes each: what another attempt goes on from."""
        self.num_attempts = 0
        self.num_fruitless_attempts = 0
        """The latest ones in a row, the current one among them; see `recovery`."""
        self.num_resumes = 0
        self.last_error: ServingError | None = None
        """What ended the attempt before this one."""
        self.unwanted_workers: set[str] = set()
        """Present ones that let an attempt of this request down: only if nobody else has room."""
        self.is_recomputed = False
        """The next attempt computes the prompt where it decodes: its KV did not arrive."""

        # The current attempt.
        self.handoff_id = ""
        """Empty before the first."""
        self.prefill_worker: str | None = None
        """That still has something of ours; None: nobody, or let go."""
        self.decode_worker: str | None = None
        self.num_given_tokens = 0
        """Output of earlier attempts: to this one's engines the end of the prompt."""
        self.next_token_by = WorkerRole.PREFILL
        """Who samples this attempt's first token."""
        self.kv_source: KvSource | None = None
        self.is_alone = False
        """No other prompt was waiting at the worker that computes this one."""
        self.is_streamed = False
        self.pull_reason: str | None = None
        """The decode worker was told when the prefill began; KV moves meanwhile."""
        self.given_delta: SequenceDelta | None = None
        """The client has this first token of the prefill worker, and the decode worker will tell it again."""
        self.early_deltas: list[SequenceDelta] = []
        """Streamed: what the decode worker said before the prefill worker's word was heard."""
        self.num_bytes_to_move = 0
        """KV that the decode worker did not hold when it was chosen."""
        self.started_s: float | None = None
        """None: no prefill belongs to it."""
        self.prompt_computed_s: float | None = None
        self.num_prefilled_tokens = 0
        """Over all attempts, without hits."""

        # What the client is told. An attempt that goes on from tokens adds to it and changes none of it.
        self.last_prefill_worker: str | None = None
        self.last_decode_worker: str | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.first_token_by = WorkerRole.PREFILL
        self.first_token_reason = ""
        self.hits: KnownHits | None = None
        """Who holds how much of the prompt, when last asked; kept for its hashes."""
        self.predicted_hit_tokens: int | None = None
        """Of the worker that computes the prompt; None: nothing was known."""
        self.hit_tokens: int | None = None
        """What that worker's engine found; None: it did not say, or not yet."""
        self.num_bytes_moved = 0
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
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens_left(self) -> int:
        return self.submission.sampling.max_tokens - len(self.output_token_ids)

    @property
    def needs_decode(self) -> bool:
        return self.num_tokens_left > 1

    def is_late(self, now_s: float) -> bool:
        """It waits for a worker, and nothing of it has been sent that could still be of use."""
        return (
            self.deadline_s is not None
            and now_s >= self.deadline_s
            and self.state is RequestState.QUEUED
            and not self.num_output_tokens
        )

    @property
    def is_resumed(self) -> bool:
        """This attempt goes on from tokens that the client had before it."""
        return self.num_given_tokens > 0

    @property
    def num_context_tokens(self) -> int:
        """Prompt, and what the client was given since."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_leg_tokens(self) -> int:
        """Of the prompt as this attempt began with it."""
        return self.num_prompt_tokens + self.num_given_tokens

    def context(self) -> bytes:
        """Packed ids of prompt and output: what the next token follows from."""
        prompt = self.submission.prompt_token_ids
        return prompt + pack_token_ids(self.output_token_ids) if self.output_token_ids else prompt

    def sampling_left(self) -> SamplingSpec:
        """The client's wishes, less what it was given."""
        sampling, num_output = self.submission.sampling, len(self.output_token_ids)
        if num_output:
            sampling = msgspec.structs.replace(
                sampling,
                max_tokens=sampling.max_tokens - num_output,
                min_tokens=max(0, sampling.min_tokens - num_output),
            )
        if self.prompt_logprobs is not None and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return sampling

    @property
    def wants_prompt_logprobs(self) -> bool:
        """And has not got them: an engine then computes the prompt whole."""
        return self.submission.sampling.prompt_logprobs is not None and self.prompt_logprobs is None

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
        now_s: float,
        *,
        prefill_worker: str | None,
        decode_worker: str | None,
        way: Way,
        way_reason: str,
        stream: KvSource | None = None,
        pull_reason: str | None = None,
    ) -> None:
        """A worker that is None has no part in this attempt; the same one twice serves both phases. Neither
        `stream` nor `pull_reason`: nothing is handed over."""
        is_on_one_worker = prefill_worker == decode_worker
        self.num_attempts += 1
        self.num_fruitless_attempts += 1
        self.num_given_tokens = len(self.output_token_ids)
        if self.is_resumed:
            self.num_resumes += 1
        self.is_streamed, self.pull_reason = stream is not None, pull_reason
        self.given_delta, self.early_deltas = None, []
        self.handoff_id = handoff_id
        self.way, self.way_reason = way, way_reason
        self.kv_source = None
        self.prefill_worker = None if is_on_one_worker else prefill_worker
        self.decode_worker = decode_worker
        self.last_prefill_worker = prefill_worker or self.last_prefill_worker
        self.last_decode_worker = decode_worker or self.last_decode_worker
        self.prompt_computed_s = None
        self.started_s = None if prefill_worker is None else now_s
        if prefill_worker is not None:
            if not self.is_resumed:
                self.dispatched_s, self.prefill_finished_s = now_s, None
            self._choose_first_token(is_on_one_worker=is_on_one_worker, stream=stream)
        self.update_placement()

    def _choose_first_token(self, *, is_on_one_worker: bool, stream: KvSource | None) -> None:
        reason = "one worker for both phases" if is_on_one_worker else None
        reason = reason or reason_for_decode(self.sampling_left(), is_streamed=stream is not None)
        if reason is None and stream is not None and not stream.has_first_token:
            reason = "streamed"  # its prompt left before there was a token to append
        by = WorkerRole.PREFILL if reason is None else WorkerRole.DECODE
        self.choose_next_token(by, reason or "ready when prefill ends")

    def choose_next_token(self, by: WorkerRole, reason: str) -> None:
        self.next_token_by = by
        if not self.is_resumed:
            self.first_token_by, self.first_token_reason = by, reason

    def prompt_computed(self, now_s: float, num_hit_tokens: int | None) -> None:
        """`num_hit_tokens`: the engine's word; None: it has not said, what was predicted stands for it."""
        num_hits = self.predicted_hit_tokens if num_hit_tokens is None else num_hit_tokens
        self.num_prefilled_tokens += self.num_leg_tokens - (num_hits or 0)
        self.prompt_computed_s = now_s
        if not self.is_resumed:
            self.prefill_finished_s = now_s

    def found_hits(self, num_hit_tokens: int | None) -> None:
        """The engine's word. Of a prompt with output in it, it would not be about the client's prompt."""
        if not self.is_resumed:
            self.hit_tokens = num_hit_tokens

    @property
    def transfer(self) -> Transfer | None:
        """Of this attempt; None: nothing is handed over."""
        if self.is_streamed:
            return Transfer.STREAM
        return None if self.pull_reason is None else Transfer.PULL

    def update_placement(self) -> None:
        self.placement = Placement(
            prefill_worker=self.last_prefill_worker,
            decode_worker=self.last_decode_worker,
            way=self.way,
            way_reason=self.way_reason,
            transfer=self.transfer,
            transfer_reason=self.pull_reason,
            first_token_by=self.first_token_by,
            first_token_reason=self.first_token_reason,
            num_attempts=max(1, self.num_attempts),
            predicted_hit_tokens=self.predicted_hit_tokens,
            hit_tokens=self.hit_tokens,
        )

    def phases(self, now_s: float) -> PhaseTimes:
        """Consecutive spans, so that they add up to now - submitted: of the attempt that gave the first
        token, and everything after that token is decode."""
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
    phase: str | None,
) -> RequestReport:
    """The usage record: one for each accepted request, however it ended. `phase`: see `RequestReport`."""
    return RequestReport(
        outcome=outcome,
        error=error.report() if error is not None else None,
        finish_reason=last.finish_reason if last is not None else None,
        stop_reason=last.stop_reason if last is not None else None,
        phase=phase,
        num_prompt_tokens=request.num_prompt_tokens,
        num_prefilled_tokens=request.num_prefilled_tokens,
        num_output_tokens=request.num_output_tokens,
        num_cached_tokens=request.hit_tokens or 0,
        num_resumes=request.num_resumes,
        kv_bytes=request.num_bytes_moved,
        placement=request.placement,
        phases=request.phases(now_s),
        prompt_logprobs=request.prompt_logprobs,
    )
