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
from enum import Enum
from functools import lru_cache

import msgspec

from baton.contract.errors import DuplicateRequest, ServingError, error_from_report
from baton.contract.lifecycle import Outcome
from baton.contract.messages import PhaseTimes, Placement, RequestReport, SequenceDelta, TokenLogprobs
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import num_token_ids
from coordinator.http.exchange import Exchange
from coordinator.http.sse import to_json
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

    def reports(self) -> list[RequestReport]:
        """Of the sequences that have ended."""
        return [sequence.report for sequence in self._sequences if sequence.report is not None]

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


def placement_headers(placements: tuple[Placement, ...]) -> bytes:
    """Who served the request, which way, and what of its prompt was cached; several values when its
    sequences were served apart. Complete but for hits that the engine tells at the end."""
    if len(placements) == 1:  # nearly always, and per request: without a list of fields
        (one,) = placements
        predicted, found = one.predicted_hit_tokens, one.hit_tokens
        head = _served_headers((_served(one),))
        if predicted is not None:
            head = b"%bx-baton-hit-tokens-predicted: %d\r\n" % (head, predicted)
        return head if found is None else b"%bx-baton-hit-tokens: %d\r\n" % (head, found)
    return _served_headers(tuple(map(_served, placements))) + _header_lines(_hit_fields(placements))


Reasoned = tuple[Enum | None, str | None]
Served = tuple[str | None, str | None, Reasoned, Reasoned, Reasoned]


def _served(p: Placement) -> Served:
    way, transfer = (p.way, p.way_reason), (p.transfer, p.transfer_reason)
    return p.prefill_worker, p.decode_worker, way, transfer, (p.first_token_by, p.first_token_reason)


@lru_cache(maxsize=4096)  # a fleet has few pairs, and each request asks
def _served_headers(served: tuple[Served, ...]) -> bytes:
    return _header_lines(_served_fields(served))


def _served_fields(served: Seq[Served]) -> list[tuple[str, str]]:
    return _distinct(
        ("prefill-worker", [prefill for prefill, *_ in served]),
        ("decode-worker", [decode for _, decode, *_ in served]),
        ("way", [_with_reason(*way) for _, _, way, _, _ in served]),
        ("transfer", [_with_reason(*transfer) for *_, transfer, _ in served]),
        ("first-token", [_with_reason(*first) for *_, first in served]),
    )


def _hit_fields(placements: Seq[Placement]) -> list[tuple[str, str]]:
    return _distinct(
        ("hit-tokens-predicted", [_shown(p.predicted_hit_tokens) for p in placements]),
        ("hit-tokens", [_shown(p.hit_tokens) for p in placements]),
    )


def _distinct(*fields: tuple[str, list[str | None]]) -> list[tuple[str, str]]:
    joined = [(name, ", ".join(dict.fromkeys(filter(None, values)))) for name, values in fields]
    return [(name, header_text(value)) for name, value in joined if value]


def _with_reason(what: Enum | None, reason: str | None) -> str | None:
    if what is None:
        return None
    return f"{what.value}; {reason}" if reason else str(what.value)


def _shown(number: int | None) -> str | None:
    return None if number is None else str(number)


def _slowest(reports: Seq[RequestReport]) -> PhaseTimes:
    if len(reports) == 1:
        return reports[0].phases
    return max((r.phases for r in reports), key=lambda p: p.queue_s + p.prefill_s + p.handoff_s + p.decode_s)


def _phase_fields(reports: Seq[RequestReport]) -> list[tuple[str, str]]:
    """Phase times of the sequence that took longest, in milliseconds: people read these."""
    phases = _slowest(reports)
    return [
        ("queue-ms", f"{phases.queue_s * 1e3:.1f}"),
        ("prefill-ms", f"{phases.prefill_s * 1e3:.1f}"),
        ("handoff-ms", f"{phases.handoff_s * 1e3:.1f}"),
        ("decode-ms", f"{phases.decode_s * 1e3:.1f}"),
        ("attempts", str(max(r.placement.num_attempts for r in reports))),
        ("resumes", str(sum(r.num_resumes for r in reports))),
        ("kv-bytes", str(sum(r.kv_bytes for r in reports))),
    ]


def ending_headers(reports: Seq[RequestReport]) -> bytes:
    """What is known at the end only."""
    if len(reports) > 1:
        return _header_lines(_phase_fields(reports))
    (one,) = reports
    phases = one.phases
    return (
        b"x-baton-queue-ms: %.1f\r\nx-baton-prefill-ms: %.1f\r\nx-baton-handoff-ms: %.1f\r\n"
        b"x-baton-decode-ms: %.1f\r\nx-baton-attempts: %d\r\nx-baton-resumes: %d\r\n"
        b"x-baton-kv-bytes: %d\r\n"
    ) % (
        phases.queue_s * 1e3, phases.prefill_s * 1e3, phases.handoff_s * 1e3, phases.decode_s * 1e3,
        one.placement.num_attempts, one.num_resumes, one.kv_bytes,
    )  # fmt: skip


def ending_trailers(reports: Seq[RequestReport]) -> bytes:
    """After a stream, for clients that say they read trailers."""
    return _header_lines([*_hit_fields([r.placement for r in reports]), *_phase_fields(reports)])


def ending_document(reports: Seq[RequestReport]) -> bytes:
    """All of the headers as JSON, for the usage event of a stream; hits are summed over its choices."""
    placements = [report.placement for report in reports]
    phases = _slowest(reports)
    predicted = [p.predicted_hit_tokens for p in placements if p.predicted_hit_tokens is not None]
    found = [p.hit_tokens for p in placements if p.hit_tokens is not None]
    return (
        b'{%b"hit_tokens_predicted":%b,"hit_tokens":%b,"queue_ms":%.1f,"prefill_ms":%.1f,'
        b'"handoff_ms":%.1f,"decode_ms":%.1f,"attempts":%d,"resumes":%d,"kv_bytes":%d}'
    ) % (
        _served_document(tuple(map(_served, placements))),
        b"%d" % sum(predicted) if predicted else b"null", b"%d" % sum(found) if found else b"null",
        phases.queue_s * 1e3, phases.prefill_s * 1e3, phases.handoff_s * 1e3, phases.decode_s * 1e3,
        max([p.num_attempts for p in placements]), sum([report.num_resumes for report in reports]),
        sum([report.kv_bytes for report in reports]),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _served_document(served: tuple[Served, ...]) -> bytes:
    """The first members of an object, each with its comma."""
    fields = _served_fields(served)
    return b"".join(b'"%b":%b,' % (n.replace("-", "_").encode(), to_json(value)) for n, value in fields)


def _header_lines(fields: list[tuple[str, str]]) -> bytes:
    return "".join([f"x-baton-{name}: {value}\r\n" for name, value in fields]).encode("ascii")


def header_text(text: str) -> str:
    """A worker's name comes over the wire: nothing in it may end a header line."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:512]
