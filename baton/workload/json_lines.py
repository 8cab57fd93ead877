"""Traces as one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from baton.workload.trace import NO_SESSION, Ints, Trace, TraceRequest, WorkloadError, trace_of

MOONCAKE_BLOCK_TOKENS = 512
CONVERSATIONS_BLOCK_TOKENS = 64
BAILIAN_BLOCK_TOKENS = 16

Line = dict[str, Any]


class _Bad(Exception):
    """What is wrong with one line; `read` adds where."""


class _Sessions:
    """Whole numbers for whatever names a file gives its conversations."""

    def __init__(self) -> None:
        self._ids: dict[str | int, int] = {}

    def id_of(self, name: object) -> int:
        if not isinstance(name, str | int):
            raise _Bad(f"a session named {name!r}, expected text or a whole number")
        return self._ids.setdefault(name, len(self._ids))


class _Chats:
    """Bailian's lines name the chat before them; the root of that chain is the session."""

    def __init__(self) -> None:
        self._root: dict[int, int] = {}

    def session_of(self, chat: int, parent: int) -> int:
        return self._root.setdefault(chat, self._root.get(parent, chat))


def read(lines: Iterable[str], path: str, name: str, block_size_tokens: int | None) -> Trace:
    """`path` is for messages. The first object decides the format of all."""
    parse: Callable[[Line, int], TraceRequest] | None = None
    requests: list[TraceRequest] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = _object(text)
            if parse is None:
                if set(line) == {"block_size_tokens"}:
                    block_size_tokens = block_size_tokens or _int(line, "block_size_tokens")
                    continue
                implied, parse = _format(line)
                block_size_tokens = implied if block_size_tokens is None else block_size_tokens
            requests.append(parse(line, block_size_tokens or 0))
        except _Bad as bad:
            raise WorkloadError(f"{path}, line {number}: {bad}") from None
    if not requests:
        raise WorkloadError(f"{path} has no requests")
    has_hashes = any(len(request.block_hashes) for request in requests)
    return trace_of(requests, name=name, block_size_tokens=block_size_tokens or 0 if has_hashes else 0)


def _format(line: Line) -> tuple[int, Callable[[Line, int], TraceRequest]]:
    """(tokens of a block, how to read a line)"""
    if "num_prompt_tokens" in line:
        return 0, _plain(_Sessions())
    if "parent_chat_id" in line:
        return BAILIAN_BLOCK_TOKENS, _bailian(_Chats())
    if "conversation" in line:
        return CONVERSATIONS_BLOCK_TOKENS, _conversations(_Sessions())
    if "input_length" in line:
        return MOONCAKE_BLOCK_TOKENS, _mooncake
    raise _Bad(
        f"fields {', '.join(sorted(line)) or 'none'} belong to no known trace, expected num_prompt_tokens "
        "and num_output_tokens, or timestamp, input_length and output_length"
    )


def _mooncake(line: Line, block: int) -> TraceRequest:
    prompt = _int(line, "input_length", 1)
    return TraceRequest(
        position=0,
        arrival_s=_number(line, "timestamp") / 1000,
        num_prompt_tokens=prompt,
        num_output_tokens=_int(line, "output_length", 1),
        block_hashes=_hashes(line, "hash_ids", prompt, block),
        session_id=NO_SESSION,
        turn=0,
        think_s=0.0,
    )


def _conversations(sessions: _Sessions) -> Callable[[Line, int], TraceRequest]:
    def parse(line: Line, block: int) -> TraceRequest:
        return _mooncake(line, block)._replace(
            session_id=sessions.id_of(_field(line, "conversation")),
            turn=_int(line, "turn"),
            think_s=_number(line, "think_time"),
        )

    return parse


def _bailian(chats: _Chats) -> Callable[[Line, int], TraceRequest]:
    def parse(line: Line, block: int) -> TraceRequest:
        request = _mooncake(line, block)
        # Recorded think times do not exist: the file has arrivals, not ends of answers.
        return request._replace(
            arrival_s=_number(line, "timestamp"),
            session_id=chats.session_of(_int(line, "chat_id"), _int(line, "parent_chat_id", -1)),
            turn=_int(line, "turn"),
        )

    return parse


def _plain(sessions: _Sessions) -> Callable[[Line, int], TraceRequest]:
    def parse(line: Line, block: int) -> TraceRequest:
        prompt = _int(line, "num_prompt_tokens", 1)
        has_hashes = "block_hashes" in line
        if has_hashes and not block:
            raise _Bad('block_hashes without a block size: the first line is {"block_size_tokens": N}')
        session = line.get("session_id")
        return TraceRequest(
            position=0,
            arrival_s=_number(line, "arrival_s"),
            num_prompt_tokens=prompt,
            num_output_tokens=_int(line, "num_output_tokens", 1),
            block_hashes=_hashes(line, "block_hashes", prompt, block)
            if has_hashes
            else np.zeros(0, np.int64),
            session_id=NO_SESSION if session is None else sessions.id_of(session),
            turn=_int(line, "turn") if "turn" in line else 0,
            think_s=_number(line, "think_s") if "think_s" in line else 0.0,
        )

    return parse


def _object(text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise _Bad(f"{text.strip()[:80]!r} is not JSON: {error}") from None
    if not isinstance(line, dict):
        raise _Bad(f"{text.strip()[:80]!r}, expected a JSON object")
    return line


def _field(line: Line, name: str) -> object:
    if name not in line:
        raise _Bad(f"{name} is missing, found {', '.join(sorted(line))}")
    return line[name]


def _int(line: Line, name: str, at_least: int = 0) -> int:
    value = _field(line, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise _Bad(f"{name} is {value!r}, expected a whole number of at least {at_least}")
    return value


def _number(line: Line, name: str) -> float:
    value = _field(line, name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise _Bad(f"{name} is {value!r}, expected a number of at least 0")
    return float(value)


def _hashes(line: Line, name: str, num_prompt_tokens: int, block: int) -> Ints:
    value = _field(line, name)
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise _Bad(f"{name} is {str(value)[:60]!r}, expected a list of whole numbers")
    if len(value) * block >= num_prompt_tokens + block:
        raise _Bad(
            f"{len(value)} {name} of {block} tokens for a prompt of {num_prompt_tokens}, "
            f"expected at most {-(-num_prompt_tokens // block)}"
        )
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise _Bad(f"{name} has a number beyond 64 bits") from None
