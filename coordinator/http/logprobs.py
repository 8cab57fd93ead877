"""Log probabilities in the three shapes OpenAI and vLLM clients read.

Workers send, per position, the chosen token first and then the most likely ones; a token may be in
both places, and each shape lists it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.contract.messages import TokenLogprobs, TopLogprob

_FLOOR = -9999.0
"""JSON has no -inf; OpenAI's documented stand-in."""


def _unique(position: TokenLogprobs) -> list[TopLogprob]:
    seen: dict[int, TopLogprob] = {}
    for entry in position:
        seen.setdefault(entry.token_id, entry)
    return list(seen.values())


def _name(entry: TopLogprob, as_id: bool) -> str:
    if as_id or entry.decoded is None:
        return f"token_id:{entry.token_id}"
    return entry.decoded


def _value(entry: TopLogprob) -> float:
    return max(entry.logprob, _FLOOR)


def chat_logprobs(positions: Sequence[TokenLogprobs], num_top: int, as_id: bool) -> dict[str, Any]:
    content = []
    for position in positions:
        entries = _unique(position)
        chosen = _chat_entry(entries[0], as_id)
        chosen["top_logprobs"] = [_chat_entry(entry, as_id) for entry in entries[:num_top]]
        content.append(chosen)
    return {"content": content}


def _chat_entry(entry: TopLogprob, as_id: bool) -> dict[str, Any]:
    name = _name(entry, as_id)
    return {"token": name, "logprob": _value(entry), "bytes": list(name.encode("utf-8", "replace"))}


class CompletionLogprobs:
    """Builds {text_offset, token_logprobs, tokens, top_logprobs} over the events of one choice."""

    def __init__(self, num_top: int, as_id: bool) -> None:
        self._num_top = num_top
        self._as_id = as_id
        self._offset = 0

    def add(
        self, positions: Sequence[TokenLogprobs | None], names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """`names` gives the token text of positions without log probabilities (a prompt's first)."""
        result: dict[str, list[Any]] = {
            "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": [],
        }  # fmt: skip
        for number, position in enumerate(positions):
            if position:
                entries = _unique(position)
                name = _name(entries[0], self._as_id)
                value: float | None = _value(entries[0])
                # One more than asked: the chosen token comes on top.
                top = {_name(entry, self._as_id): _value(entry) for entry in entries[: self._num_top + 1]}
            else:
                name = names[number] if names is not None else ""
                value, top = None, None
            result["text_offset"].append(self._offset)
            result["token_logprobs"].append(value)
            result["tokens"].append(name)
            result["top_logprobs"].append(top)
            self._offset += len(name)
        return result


def prompt_logprobs(positions: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: token id to its entry, null for the first token."""
    return [
        None
        if position is None
        else {
            str(entry.token_id): {
                "logprob": _value(entry), "rank": entry.rank, "decoded_token": entry.decoded,
            }
            for entry in _unique(position)
        }
        for position in positions
    ]  # fmt: skip
