"""An answer as server-sent events.

Nothing is sent before the first token: benchmark clients take the first event as the first token.
A token then costs one escape, one concatenation and one write. The event that ends a choice is kept
for the current turn of the loop, because the report usually follows at once: a short answer leaves
in a single write, headers and [DONE] included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from typing import Any, cast

from baton.contract.errors import ServingError
from baton.contract.messages import Placement, RequestReport, SequenceDelta
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import num_token_ids, unpack_token_ids
from coordinator.http.answer import (
    Answer,
    AnswerStyle,
    Prompt,
    Sequence,
    ending_document,
    ending_trailers,
    placement_headers,
)
from coordinator.http.exchange import Exchange
from coordinator.http.logprobs import CompletionLogprobs, chat_logprobs
from coordinator.http.sse import DONE, ChunkFormat, error_event, to_json, usage_fields, usage_suffix
from coordinator.http.tool_calls import ToolCallReader
from coordinator.intake import Intake

_END = b"}\n\n"


class StreamedSequence(Sequence):
    __slots__ = ("after", "before", "has_begun", "has_role", "is_plain", "logprobs", "reader")

    answer: StreamedAnswer

    def __init__(self, index: int, prompt: Prompt, sampling: SamplingSpec) -> None:
        super().__init__(index, prompt, sampling)
        self.before = b""
        self.after = b""
        self.is_plain = False
        """Events after the first hold nothing but text."""
        self.has_begun = False
        self.has_role = False
        self.logprobs: CompletionLogprobs | None = None
        self.reader: ToolCallReader | None = None

    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None:
        answer = self.answer
        if answer.is_over:
            return
        self.num_tokens += len(delta.token_ids)
        if self.is_plain and self.has_begun and delta.finish_reason is None:
            answer.exchange.send(self.before, to_json(delta.text), self.after)
        else:
            answer.send_delta(self, delta, placement)

    def on_finished(self, report: RequestReport) -> None:
        answer = self.answer
        if self.finish_reason is None and not answer.is_over and report.error is None:
            # The worker's last delta did not say so, or there was none.
            answer.send_delta(self, _ending(report), report.placement)
        answer.sequence_finished(self, report)


class StreamedAnswer(Answer):
    def __init__(
        self, exchange: Exchange, intake: Intake, style: AnswerStyle, sequences: Seq[StreamedSequence]
    ) -> None:
        super().__init__(exchange, intake, style, sequences)
        self._has_begun = False
        self._held = b""
        self._format: ChunkFormat | None = None
        for sequence in sequences:
            sequence.answer = self

    def send_delta(self, sequence: StreamedSequence, delta: SequenceDelta, placement: Placement) -> None:
        """Any event that is not plain: the first and last of a choice, logprobs, usage, tools."""
        style = self.style
        if not self._has_begun:
            self._begin(placement)
        assert self._format is not None
        is_first = not sequence.has_begun
        if is_first:
            self._begin_sequence(sequence)
        finish_reason = sequence.finish_reason = delta.finish_reason
        sequence.stop_reason = delta.stop_reason
        payloads = self._payloads(sequence, delta, is_first)
        if finish_reason == "stop" and sequence.reader is not None and sequence.reader.ends_as_tool_calls:
            finish_reason = sequence.finish_reason = "tool_calls"
        usage = b""
        if style.has_continuous_usage:
            usage = usage_suffix(num_token_ids(sequence.prompt.token_ids), sequence.num_tokens)
        logprobs = self._logprobs(sequence, delta)
        events = b""
        for number, payload in enumerate(payloads):
            is_last = number == len(payloads) - 1
            events += self._format.event(
                sequence.index, payload,
                logprobs=logprobs if is_last else None,
                finish_reason=finish_reason if is_last else None,
                stop_reason=delta.stop_reason,
                token_ids=delta.token_ids if style.shows_token_ids and is_last else None,
                prompt_token_ids=unpack_token_ids(sequence.prompt.token_ids)
                if style.shows_token_ids and is_first and number == 0 else None,
                usage=usage,
            )  # fmt: skip
        if finish_reason is None:
            if events:
                self.exchange.send(events, b"", b"")
            return
        if not self._held:
            asyncio.get_running_loop().call_soon(self._flush)
        self._held += events

    def completed(self) -> None:
        last = self._held
        if self.style.include_usage:
            assert self._format is not None
            usage = usage_fields(*self.num_tokens())
            last += self._format.usage_event(usage, ending_document(self.reports()))
        self._held = b""
        trailers = ending_trailers(self.reports()) if self.exchange.reads_trailers else b""
        self.exchange.end_stream(last + DONE, trailers)

    def failed(self, error: ServingError, placement: Placement) -> None:
        if not self._has_begun:
            self.exchange.fail(error, placement_headers((placement,)))
            return
        last, self._held = self._held, b""
        self.exchange.end_stream(last + error_event(error) + DONE)

    def _begin(self, placement: Placement) -> None:
        self._has_begun = True
        self._format = ChunkFormat(
            is_chat=self.style.is_chat, response_id=self.response_id, created=self.created,
            model=self.style.model,
        )  # fmt: skip
        self.exchange.begin_stream(placement_headers((placement,)))

    def _begin_sequence(self, sequence: StreamedSequence) -> None:
        style = self.style
        assert self._format is not None
        sequence.has_begun = True
        if style.num_logprobs is not None and not style.is_chat:
            sequence.logprobs = CompletionLogprobs(style.num_logprobs, style.names_tokens_by_id)
        if style.tools is not None:
            sequence.reader = style.tools.reader()
        sequence.is_plain = not (
            style.num_logprobs is not None or style.has_continuous_usage or style.shows_token_ids
            or style.echoes_only or style.tools is not None
        )  # fmt: skip
        if sequence.is_plain:
            sequence.before = self._format.before_text(sequence.index)
            sequence.after = self._format.after_text() + _END

    def _payloads(
        self, sequence: StreamedSequence, delta: SequenceDelta, is_first: bool
    ) -> list[dict[str, Any]]:
        """What this delta adds, one entry per event; may be none while a tool call is incomplete."""
        style = self.style
        if not style.is_chat:
            text = "" if style.echoes_only else delta.text
            if is_first and style.echoes:
                text = (sequence.prompt.text or "") + text
            return [{"text": text}]
        if sequence.reader is None:
            deltas = [{"content": delta.text}]
        else:
            deltas = sequence.reader.feed(delta.text, is_last=delta.finish_reason is not None)
            if delta.finish_reason is not None and not deltas:
                deltas = [{}]
        if deltas and not sequence.has_role:
            sequence.has_role = True
            deltas[0] = {"role": "assistant", **deltas[0]}
        return [{"delta": entry} for entry in deltas]

    def _logprobs(self, sequence: StreamedSequence, delta: SequenceDelta) -> dict[str, Any] | None:
        style = self.style
        if style.num_logprobs is None or not delta.logprobs:
            return None
        if style.is_chat:
            return chat_logprobs(delta.logprobs, style.num_logprobs, style.names_tokens_by_id)
        return cast(CompletionLogprobs, sequence.logprobs).add(delta.logprobs)

    def _flush(self) -> None:
        """The report did not follow at once: do not keep the last token from the client."""
        if self._held and not self.is_over:
            held, self._held = self._held, b""
            self.exchange.send(held, b"", b"")


def _ending(report: RequestReport) -> SequenceDelta:
    return SequenceDelta(
        handoff_id="", token_ids=[], text="", finish_reason=report.finish_reason or "stop",
        stop_reason=report.stop_reason,
    )  # fmt: skip
