"""Joins the sequences of one HTTP request: n choices of each prompt become one answer.

Each sequence is a submission of its own. The first that fails ends the request: the others are
aborted, on the loop's next turn because a sink must not call back into the core.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import lru_cache

import msgspec

from baton.contract.errors import DuplicateRequest, ServingError, error_from_report
from baton.contract.lifecycle import Outcome
from baton.contract.messages import Placement, RequestReport, SequenceDelta, TokenLogprobs
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import num_token_ids
from coordinator.http.exchange import Exchange
from coordinator.http.tool_calls import ToolCallStyle
from coordinator.intake import Intake, Submission


class AnswerStyle(msgspec.Struct, frozen=True, kw_only=True):
    """How the client wants to see what was generated.

    A msgspec struct, as all that is made per request here: a frozen dataclass of this size takes
    ten times as long to make.
    """

    is_chat: bool
    model: str
    include_usage: bool = False
    has_continuous_usage: bool = False
    num_logprobs: int | None = None
    """Alternatives to show per output token; None shows none."""
    shows_prompt_logprobs: bool = False
    shows_token_ids: bool = False
    names_tokens_by_id: bool = False
    echoes: bool = False
    echoes_only: bool = False
    """max_tokens was 0: the one token that had to be generated is not shown."""
    tools: ToolCallStyle | None = None


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    token_ids: bytes
    text: str | None = None
    """For echo."""
    token_names: list[str] | None = None
    """For echo with logprobs: the first token has no log probability to carry its text."""


class Sequence(ABC):
    """One choice: the sink of one submission."""

    __slots__ = ("answer", "finish_reason", "index", "num_tokens", "prompt", "report", "request_id",
                 "sampling", "stop_reason")  # fmt: skip

    def __init__(self, index: int, prompt: Prompt, sampling: SamplingSpec) -> None:
        self.index = index
        self.prompt = prompt
        self.sampling = sampling
        self.request_id = ""
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.report: RequestReport | None = None

    @abstractmethod
    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None: ...

    @abstractmethod
    def on_finished(self, report: RequestReport) -> None: ...


def start_answer(make: Callable[[], Answer], exchange: Exchange) -> None:
    """Submits under the client's request id, or under one with a suffix if that id is in flight:
    benchmark clients use ids again while the first use is still being aborted."""
    try:
        make().start()
    except DuplicateRequest:
        exchange.request_id += f"~{random.getrandbits(32):08x}"
        make().start()


class Answer(ABC):
    def __init__(
        self, exchange: Exchange, intake: Intake, style: AnswerStyle, sequences: Seq[Sequence]
    ) -> None:
        self.exchange = exchange
        self.style = style
        self.created = int(time.time())
        self.is_over = False
        """Answered, failed or abandoned: what still arrives is ignored."""
        self._intake = intake
        self._sequences = sequences
        self._num_open = len(sequences)

    @property
    def response_id(self) -> str:
        return f"{'chatcmpl' if self.style.is_chat else 'cmpl'}-{self.exchange.request_id}"

    def start(self) -> None:
        """Submit all sequences or none. Raises what the core raises; the answer is over then."""
        self.exchange.on_client_gone = self._client_gone
        base = self.exchange.request_id
        submitted: list[str] = []
        try:
            for sequence in self._sequences:
                sequence.request_id = base if len(self._sequences) == 1 else f"{base}-{sequence.index}"
                submission = Submission(
                    request_id=sequence.request_id,
                    prompt_token_ids=sequence.prompt.token_ids,
                    sampling=sequence.sampling,
                )
                self._intake.submit(submission, sequence)
                submitted.append(sequence.request_id)
        except ServingError:
            self.is_over = True
            for request_id in submitted:
                self._intake.abort(request_id)
            raise

    def sequence_finished(self, sequence: Sequence, report: RequestReport) -> None:
        if self.is_over:
            return
        sequence.report = report
        if sequence.finish_reason is None:
            sequence.finish_reason = report.finish_reason
            sequence.stop_reason = report.stop_reason
        self._num_open -= 1
        if report.outcome is not Outcome.COMPLETED:
            self.is_over = True
            self.failed(_error_of(report), report.placement)
            if self._num_open:
                asyncio.get_running_loop().call_soon(self._abort_open)
        elif self._num_open == 0:
            self.is_over = True
            self.completed()
            # Sequence and answer name each other; untied, they are freed now and not by the collector.
            self._sequences = ()

    @abstractmethod
    def completed(self) -> None: ...

    @abstractmethod
    def failed(self, error: ServingError, placement: Placement) -> None: ...

    def num_tokens(self) -> tuple[int, int, int]:
        """(prompt, output, cached): a prompt counts once, however many choices it has."""
        prompts: dict[int, tuple[int, int]] = {}
        num_output = 0
        for sequence in self._sequences:
            num_output += 0 if self.style.echoes_only else sequence.num_tokens
            cached = sequence.report.num_cached_tokens if sequence.report is not None else 0
            prompts.setdefault(id(sequence.prompt), (num_token_ids(sequence.prompt.token_ids), cached))
        return sum(n for n, _ in prompts.values()), num_output, sum(c for _, c in prompts.values())

    def _client_gone(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._abort_open()

    def _abort_open(self) -> None:
        for sequence in self._sequences:
            if sequence.report is None:
                self._intake.abort(sequence.request_id)


def _error_of(report: RequestReport) -> ServingError:
    if report.error is not None:
        return error_from_report(report.error)
    return ServingError(f"the request ended as {report.outcome.value} without a reason")


def echoed_logprobs(sequence: Sequence) -> list[TokenLogprobs | None]:
    """The prompt's positions of an echoing answer; None where nothing is known."""
    assert sequence.report is not None
    known = sequence.report.prompt_logprobs or []
    return [*known, *[None] * (num_token_ids(sequence.prompt.token_ids) - len(known))]


@lru_cache(maxsize=4096)  # a fleet has few pairs, and each request asks
def placement_headers(placements: tuple[Placement, ...]) -> bytes:
    """Who served the request; several values when its sequences were served apart."""
    lines = []
    for name, values in (
        ("x-baton-prefill-worker", [p.prefill_worker for p in placements]),
        ("x-baton-decode-worker", [p.decode_worker for p in placements]),
        ("x-baton-first-token", [_first_token(p) for p in placements]),
    ):
        distinct = dict.fromkeys(value for value in values if value)
        if distinct:
            lines.append(f"{name}: {header_text(', '.join(distinct))}\r\n")
    return "".join(lines).encode("ascii")


def phase_headers(reports: Seq[RequestReport]) -> bytes:
    """Phase times of the sequence that took longest, in milliseconds: people read these."""
    slowest = max(reports, key=lambda r: sum((r.phases.queue_s, r.phases.prefill_s,
                                              r.phases.handoff_s, r.phases.decode_s)))  # fmt: skip
    phases = slowest.phases
    return (
        f"x-baton-queue-ms: {phases.queue_s * 1e3:.1f}\r\n"
        f"x-baton-prefill-ms: {phases.prefill_s * 1e3:.1f}\r\n"
        f"x-baton-handoff-ms: {phases.handoff_s * 1e3:.1f}\r\n"
        f"x-baton-decode-ms: {phases.decode_s * 1e3:.1f}\r\n"
        f"x-baton-attempts: {max(r.placement.num_attempts for r in reports)}\r\n"
    ).encode("ascii")


def header_text(text: str) -> str:
    """A worker's name comes over the wire: nothing in it may end a header line."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:512]


def _first_token(placement: Placement) -> str | None:
    if placement.first_token_by is None:
        return None
    reason = f"; {placement.first_token_reason}" if placement.first_token_reason else ""
    return placement.first_token_by.value + reason
