"""The bytes of a stream's events.

All that stays the same for one choice is serialised once, so a token costs one escape of its text
and one concatenation. Field order and names are vLLM's.
"""

from __future__ import annotations

from typing import Any

import msgspec

from baton.contract.errors import ServingError
from coordinator.http.errors import error_body

to_json = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
_EVENT_END = b"}\n\n"


class ChunkFormat:
    """Events of one response, completions or chat."""

    def __init__(self, *, is_chat: bool, response_id: str, created: int, model: str) -> None:
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        base = to_json({"id": response_id, "object": kind, "created": created, "model": model})
        self._base = b"data: " + base[:-1] + b',"choices":['
        self._is_chat = is_chat

    def before_text(self, index: int) -> bytes:
        """Up to the text of a choice; for chat, of any but its first event."""
        return self._choice(index) + (b'"delta":{"content":' if self._is_chat else b'"text":')

    def after_text(self) -> bytes:
        """After the text of an event with nothing special in it, up to where usage may follow."""
        return b'%b,"logprobs":null,"finish_reason":null}]' % (b"}" if self._is_chat else b"")

    def event(
        self, index: int, payload: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None,
        stop_reason: int | str | None = None, token_ids: list[int] | None = None,
        prompt_token_ids: list[int] | None = None, usage: bytes = b"",
    ) -> bytes:  # fmt: skip
        """Any event of a choice; `payload` is {"text": ...} or {"delta": ...}."""
        fields = dict(payload)
        fields["logprobs"] = logprobs
        fields["finish_reason"] = finish_reason
        if finish_reason is not None:
            fields["stop_reason"] = stop_reason
        if token_ids is not None:
            fields["token_ids"] = token_ids
        tail = b"]"
        if prompt_token_ids is not None:
            if self._is_chat:
                tail += b',"prompt_token_ids":' + to_json(prompt_token_ids)
            else:
                fields["prompt_token_ids"] = prompt_token_ids
        return b"".join((self._choice(index), to_json(fields)[1:], tail, usage, _EVENT_END))

    def usage_event(self, usage: dict[str, Any], ending: bytes) -> bytes:
        """The last event before [DONE]: benchmark clients read usage from empty choices. `ending` is
        ours, JSON: what the headers of a whole answer say."""
        return b'%b],"usage":%b,"baton":%b}\n\n' % (self._base, to_json(usage), ending)

    def _choice(self, index: int) -> bytes:
        return b'%b{"index":%d,' % (self._base, index)


def usage_suffix(num_prompt_tokens: int, num_output_tokens: int) -> bytes:
    """`continuous_usage_stats`: usage so far, inside each event."""
    return b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}' % (
        num_prompt_tokens, num_prompt_tokens + num_output_tokens, num_output_tokens,
    )  # fmt: skip


def usage_fields(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "completion_tokens": num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def error_event(error: ServingError) -> bytes:
    return b"data: " + error_body(error) + b"\n\n"
