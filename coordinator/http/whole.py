"""An answer as one JSON document, written when its last sequence has ended."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from baton.contract.errors import ServingError
from baton.contract.messages import Placement, RequestReport, SequenceDelta, TokenLogprobs
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import unpack_token_ids
from coordinator.http.answer import (
    Answer,
    AnswerStyle,
    Prompt,
    Sequence,
    echoed_logprobs,
    ending_headers,
    placement_headers,
)
from coordinator.http.exchange import Exchange
from coordinator.http.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from coordinator.http.sse import to_json, usage_fields
from coordinator.intake import Intake


class CollectedSequence(Sequence):
    __slots__ = ("logprobs", "pieces", "token_ids")

    answer: WholeAnswer

    def __init__(self, index: int, prompt: Prompt, sampling: SamplingSpec) -> None:
        super().__init__(index, prompt, sampling)
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []

    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None:
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.num_tokens += len(delta.token_ids)
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason

    def on_finished(self, report: RequestReport) -> None:
        self.answer.sequence_finished(self, report)


class WholeAnswer(Answer):
    def __init__(
        self, exchange: Exchange, intake: Intake, style: AnswerStyle, sequences: Seq[CollectedSequence]
    ) -> None:
        super().__init__(exchange, intake, style, sequences)
        self._collected = sequences
        for sequence in sequences:
            sequence.answer = self

    def completed(self) -> None:
        reports = self.reports()
        headers = placement_headers(tuple(report.placement for report in reports)) + ending_headers(reports)
        self.exchange.respond(200, to_json(self._document()), headers=headers)
        self._collected = ()

    def failed(self, error: ServingError, placement: Placement) -> None:
        self.exchange.fail(error, placement_headers((placement,)))

    def _document(self) -> dict[str, Any]:
        style = self.style
        document: dict[str, Any] = {
            "id": self.response_id,
            "object": "chat.completion" if style.is_chat else "text_completion",
            "created": self.created,
            "model": style.model,
            "choices": [
                self._chat_choice(sequence) if style.is_chat else self._completion_choice(sequence)
                for sequence in self._collected
            ],
            "usage": usage_fields(*self.num_tokens()),
        }
        if style.is_chat:
            first = self._collected[0]
            if style.shows_prompt_logprobs and first.report is not None:
                document["prompt_logprobs"] = prompt_logprobs(first.report.prompt_logprobs or [])
            if style.shows_token_ids:
                document["prompt_token_ids"] = unpack_token_ids(first.prompt.token_ids)
        return document

    def _completion_choice(self, sequence: CollectedSequence) -> dict[str, Any]:
        style = self.style
        text = "" if style.echoes_only else "".join(sequence.pieces)
        choice: dict[str, Any] = {
            "index": sequence.index,
            "text": (sequence.prompt.text or "") + text if style.echoes else text,
            "logprobs": None,
            "finish_reason": "length" if style.echoes_only else sequence.finish_reason,
            "stop_reason": sequence.stop_reason,
        }
        if style.num_logprobs is not None:
            positions: list[TokenLogprobs | None] = [] if style.echoes_only else [*sequence.logprobs]
            names = None
            if style.echoes:
                positions = [*echoed_logprobs(sequence), *positions]
                names = sequence.prompt.token_names
            writer = CompletionLogprobs(style.num_logprobs, style.names_tokens_by_id)
            choice["logprobs"] = writer.add(positions, names)
        if style.shows_prompt_logprobs and sequence.report is not None:
            choice["prompt_logprobs"] = prompt_logprobs(sequence.report.prompt_logprobs or [])
        if style.shows_token_ids:
            choice["token_ids"] = sequence.token_ids
            choice["prompt_token_ids"] = unpack_token_ids(sequence.prompt.token_ids)
        return choice

    def _chat_choice(self, sequence: CollectedSequence) -> dict[str, Any]:
        style = self.style
        text = "".join(sequence.pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        finish_reason = sequence.finish_reason
        if style.tools is not None:
            reader = style.tools.reader()
            deltas = reader.feed(text, is_last=True)
            content = "".join(delta.get("content", "") for delta in deltas)
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
            message["content"] = content or (None if calls else "")
            if calls:
                # A message's calls carry no index; only a stream's do.
                message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
            if finish_reason == "stop" and reader.ends_as_tool_calls:
                finish_reason = "tool_calls"
        choice: dict[str, Any] = {
            "index": sequence.index,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": sequence.stop_reason,
        }
        if style.num_logprobs is not None:
            choice["logprobs"] = chat_logprobs(
                sequence.logprobs, style.num_logprobs, style.names_tokens_by_id
            )
        if style.shows_token_ids:
            choice["token_ids"] = sequence.token_ids
        return choice
