"""Tools: how a request's `tool_choice` constrains generation, and how text becomes tool_calls.

A named tool is forced by constraining the output to its parameter schema, so all text is the
call's arguments. `required` constrains it to a JSON array of {name, parameters}. Both are certain by
construction. With `auto` the model decides and its own notation must be read: `hermes` reads
<tool_call>{...}</tool_call>; without a parser the text comes back as content.

A reader is fed text as it is generated and answers with the deltas of the stream; an answer that is
not streamed feeds it once. A call of `required` or `hermes` is emitted when it is complete, so that
what a client sees is always valid JSON; a named tool's arguments stream as they come.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from baton.contract.errors import InvalidRequest
from coordinator.http.openai_schema import ChatBody, NamedTool, Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallStyle:
    kind: Literal["named", "required", "hermes"]
    name: str = ""
    is_parallel: bool = True

    def reader(self) -> ToolCallReader:
        if self.kind == "named":
            return _NamedReader(self.name)
        return (_RequiredReader if self.kind == "required" else _HermesReader)(self.is_parallel)


def tool_style(body: ChatBody, parser: str | None) -> ToolCallStyle | None:
    """Raises InvalidRequest for a choice that does not fit the tools."""
    if body.tools is not None and not body.tools:
        raise InvalidRequest("tools is empty; leave it out or name at least one", param="tools")
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if choice == "none":
        return None
    if body.tools is None:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    is_parallel = body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        names = [tool.function.name for tool in body.tools]
        if choice.function.name not in names:
            raise InvalidRequest(
                f"tool_choice names {choice.function.name!r}, tools has {', '.join(names)}",
                param="tool_choice",
            )
        return ToolCallStyle(kind="named", name=choice.function.name)
    if choice == "required":
        return ToolCallStyle(kind="required", is_parallel=is_parallel)
    return ToolCallStyle(kind="hermes", is_parallel=is_parallel) if parser == "hermes" else None


def tool_schema(style: ToolCallStyle | None, tools: list[Tool]) -> dict[str, Any] | None:
    """The JSON schema that forces the choice; None for auto."""
    if style is None or style.kind == "hermes":
        return None
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    if style.kind == "named":
        parameters = next(tool.function.parameters for tool in tools if tool.function.name == style.name)
        return parameters or empty
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        parameters = dict(tool.function.parameters or empty)
        # References inside a parameter schema are to the root of the schema.
        for name, definition in (parameters.pop("$defs", None) or {}).items():
            if definitions.setdefault(name, definition) != definition:
                raise InvalidRequest(f"two tools define {name!r} in $defs differently", param="tools")
        properties = {"name": {"type": "string", "enum": [tool.function.name]}, "parameters": parameters}
        calls.append({"properties": properties, "required": ["name", "parameters"]})
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}}
    if not style.is_parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


class ToolCallReader(ABC):
    """State of one choice."""

    def __init__(self) -> None:
        self.num_calls = 0

    @abstractmethod
    def feed(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """Deltas ({content} or {tool_calls}) that became certain with this text."""

    @property
    def ends_as_tool_calls(self) -> bool:
        """Whether finish_reason `stop` reads `tool_calls` (OpenAI: not for a named tool)."""
        return self.num_calls > 0

    def _call(self, name: str, arguments: str) -> dict[str, Any]:
        call = {
            "index": self.num_calls, "id": f"call_{random.getrandbits(96):024x}", "type": "function",
            "function": {"name": name, "arguments": arguments},
        }  # fmt: skip
        self.num_calls += 1
        return {"tool_calls": [call]}


class _NamedReader(ToolCallReader):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    @property
    def ends_as_tool_calls(self) -> bool:
        return False

    def feed(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        if self.num_calls == 0:
            return [self._call(self._name, text)]
        return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}] if text else []


class _BufferingReader(ToolCallReader):
    def __init__(self, is_parallel: bool) -> None:
        super().__init__()
        self._is_parallel = is_parallel
        self._buffer = ""

    def _emit(self, text: str) -> dict[str, Any] | None:
        """One call from its JSON; None if it is not one, or one too many."""
        try:
            call = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        if self.num_calls and not self._is_parallel:
            return {}
        arguments = call.get("parameters", call.get("arguments", {}))
        return self._call(call["name"], json.dumps(arguments, ensure_ascii=False))


class _RequiredReader(_BufferingReader):
    """Reads `[{...}, {...}]`, emitting each object when its last brace has come."""

    def feed(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        self._buffer += text
        deltas = []
        while (end := _object_end(self._buffer)) is not None:
            start = self._buffer.index("{")
            delta = self._emit(self._buffer[start:end])
            self._buffer = self._buffer[end:]
            if delta:
                deltas.append(delta)
        if is_last and self.num_calls == 0 and self._buffer:
            # Cut off by max_tokens inside the first call: show what there is.
            deltas.append({"content": self._buffer})
        return deltas


class _HermesReader(_BufferingReader):
    def feed(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        self._buffer += text
        deltas: list[dict[str, Any]] = []
        while True:
            before, tag, rest = self._buffer.partition(_OPEN)
            if not tag:
                keep = 0 if is_last else _tag_prefix(before)
                if content := before[: len(before) - keep]:
                    deltas.append({"content": content})
                self._buffer = before[len(before) - keep :]
                return deltas
            if before.strip() or (before and self.num_calls == 0):
                deltas.append({"content": before})
            self._buffer = tag + rest
            inner, close, after = rest.partition(_CLOSE)
            if not close and not is_last:
                return deltas
            self._buffer = after
            delta = self._emit(inner.strip())
            if delta is None:
                deltas.append({"content": tag + inner + close})
            elif delta:
                deltas.append(delta)


def _tag_prefix(text: str) -> int:
    """Length of the longest end of `text` that may be the beginning of the opening tag."""
    for length in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if _OPEN.startswith(text[-length:]):
            return length
    return 0


def _object_end(text: str) -> int | None:
    """Index after the first complete JSON object in `text`."""
    depth = 0
    in_string = is_escaped = False
    for index, char in enumerate(text):
        if in_string:
            if is_escaped:
                is_escaped = False
            elif char == "\\":
                is_escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = depth > 0
        elif char == "{":
            depth += 1
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                return index + 1
    return None
