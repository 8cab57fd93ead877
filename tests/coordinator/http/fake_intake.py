"""An in-memory Intake: answers submissions with scripted deltas, as the core would.

By default each request gets `max_tokens` tokens, one per turn of the loop. A script may replace the
texts, fail the request, or hold it until told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.contract.errors import DuplicateRequest, ErrorReport, ServingError
from baton.contract.lifecycle import Outcome, Transfer, Way, WorkerRole
from baton.contract.messages import (
    PhaseTimes,
    Placement,
    RequestReport,
    SequenceDelta,
    TokenLogprobs,
    TopLogprob,
)
from baton.contract.tokens import num_token_ids
from coordinator.intake import FleetFacts, ResultSink, Submission

PLACEMENT = Placement(
    prefill_worker="prefill-0", decode_worker="decode-0", first_token_by=WorkerRole.PREFILL,
    first_token_reason="plain sampling", way=Way.DISAGGREGATED, way_reason="two workers",
    transfer=Transfer.PULL, transfer_reason="no streams",
    predicted_hit_tokens=2, hit_tokens=2,
)  # fmt: skip


@dataclass
class Script:
    """What to do with a submission."""

    texts: list[str] | None = None
    """None: ` t0`, ` t1`, … up to max_tokens."""
    finish_reason: str = "length"
    stop_reason: int | str | None = None
    fails_after: int | None = None
    error: ErrorReport = field(
        default_factory=lambda: ErrorReport(code="worker_lost", message="decode-0 left", phase="decode")
    )
    is_held: bool = False
    """Nothing happens until `FakeIntake.release`."""
    is_endless: bool = False
    text_size: int = 4


class FakeIntake:
    def __init__(self) -> None:
        self.current = FleetFacts(is_ready=True, model="/models/demo", max_model_len=512)
        self.submissions: list[Submission] = []
        self.aborted: list[str] = []
        self.refusal: ServingError | None = None
        self.refuse_after: int | None = None
        self.script: Callable[[Submission], Script] = lambda submission: Script()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sinks: dict[str, ResultSink] = {}
        self._gate = asyncio.Event()

    @property
    def in_flight(self) -> set[str]:
        return set(self._sinks)

    def submit(self, submission: Submission, sink: ResultSink) -> None:
        if self.refusal is not None and len(self._sinks) >= (self.refuse_after or 0):
            raise self.refusal
        if submission.request_id in self._sinks:
            raise DuplicateRequest(f"request {submission.request_id} is in flight")
        self.submissions.append(submission)
        self._sinks[submission.request_id] = sink
        task = asyncio.get_running_loop().create_task(self._serve(submission, sink))
        self._tasks[submission.request_id] = task

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        task = self._tasks.pop(request_id, None)
        sink = self._sinks.pop(request_id, None)
        if task is not None and sink is not None:
            task.cancel()
            error = ErrorReport(code="aborted", message="the client left")
            report = RequestReport(outcome=Outcome.ABORTED, error=error)
            asyncio.get_running_loop().call_soon(sink.on_finished, report)

    def facts(self) -> FleetFacts:
        return self.current

    def snapshot(self) -> dict[str, object]:
        return {"workers": []}

    def release(self) -> None:
        self._gate.set()

    async def _serve(self, submission: Submission, sink: ResultSink) -> None:
        script = self.script(submission)
        sampling = submission.sampling
        if script.is_held:
            await self._gate.wait()
        texts = script.texts
        if texts is None:
            texts = [f" t{number}" for number in range(sampling.max_tokens)]
        number = 0
        while script.is_endless:
            await asyncio.sleep(0)
            sink.on_delta(_delta(submission, 1, "x" * script.text_size, None, None), PLACEMENT)
        for number, text in enumerate(texts, 1):
            await asyncio.sleep(0)
            if script.fails_after is not None and number > script.fails_after:
                break
            is_last = number == len(texts) and script.fails_after is None
            reason, stop = (script.finish_reason, script.stop_reason) if is_last else (None, None)
            sink.on_delta(_delta(submission, number, text, reason, stop), PLACEMENT)
        del self._sinks[submission.request_id], self._tasks[submission.request_id]
        if script.fails_after is not None:
            sink.on_finished(RequestReport(outcome=Outcome.FAILED, error=script.error, placement=PLACEMENT))
            return
        num_prompt = num_token_ids(submission.prompt_token_ids)
        sink.on_finished(
            RequestReport(
                outcome=Outcome.COMPLETED,
                finish_reason=script.finish_reason,
                stop_reason=script.stop_reason,
                num_prompt_tokens=num_prompt,
                num_output_tokens=len(texts),
                num_cached_tokens=2,
                kv_bytes=1024,
                placement=PLACEMENT,
                phases=PhaseTimes(queue_s=0.001, prefill_s=0.002, handoff_s=0.003, decode_s=0.004),
                prompt_logprobs=_prompt_logprobs(submission),
            )
        )


def _delta(
    submission: Submission, token_id: int, text: str, finish_reason: str | None, stop: int | str | None
) -> SequenceDelta:
    count = submission.sampling.logprobs
    logprobs = None if count is None else [logprobs_of(token_id, text, count)]
    return SequenceDelta(
        handoff_id="h", token_ids=[token_id], text=text, finish_reason=finish_reason, stop_reason=stop,
        logprobs=logprobs,
    )  # fmt: skip


def logprobs_of(token_id: int, text: str, count: int) -> TokenLogprobs:
    """The chosen token first, then `count` alternatives of which it is the first."""
    chosen = TopLogprob(token_id, -0.5, 1, text)
    others = [TopLogprob(token_id + 1000 + i, -1.0 - i, i + 2, f"alt{i}") for i in range(count - 1)]
    return [chosen, *([chosen] if count else []), *others]


def _prompt_logprobs(submission: Submission) -> list[TokenLogprobs | None] | None:
    count = submission.sampling.prompt_logprobs
    if count is None:
        return None
    num = num_token_ids(submission.prompt_token_ids)
    return [None, *(logprobs_of(i, f"p{i}", count) for i in range(1, num))]
