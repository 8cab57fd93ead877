"""A conversation to the prompt string, exactly as transformers' `apply_chat_template` renders it.

Templates are Jinja programs that come with the model, and may come with a request, so they run in
jinja2's immutable sandbox with the same extensions and globals that transformers gives them.
Messages are first brought into the shape vLLM hands to templates: text parts joined by newlines, or
kept as parts for templates that iterate over them; tool call arguments parsed from JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.contract.errors import InvalidRequest

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class _GenerationBlock(Extension):
    """`{% generation %}` marks assistant text for training; rendering passes it through."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_passed"), [], [], body).set_lineno(line)

    def _passed(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
)
_environment.filters["tojson"] = _to_json
_environment.globals["raise_exception"] = _raise
_environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)


class ChatTemplate:
    """Templates by name, and the special tokens they may print."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: list[dict[str, Any]] | None = None,
        source: str | None = None, add_generation_prompt: bool = True, continue_final_message: bool = False,
        documents: list[dict[str, Any]] | None = None, extra: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """`source` replaces the model's own template. Raises InvalidRequest with the template's words."""
        text = self._pick(tools) if source is None else source
        try:
            template, wants_parts = _compiled(text)
            conversation = [shape_message(message, wants_parts) for message in messages]
            if continue_final_message:
                _mark_final(conversation)
            variables = {
                **self._special_tokens, **(extra or {}), "messages": conversation, "tools": tools,
                "documents": documents, "add_generation_prompt": add_generation_prompt,
            }  # fmt: skip
            rendered = template.render(**variables)
        except InvalidRequest:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError,
                ArithmeticError, LookupError, RecursionError) as error:  # fmt: skip
            reason = str(error) or type(error).__name__
            raise InvalidRequest(
                f"the chat template refused this conversation: {reason}", param="messages"
            ) from error
        return _cut_final(rendered) if continue_final_message else rendered

    def _pick(self, tools: list[dict[str, Any]] | None) -> str:
        if tools is not None and "tool_use" in self._sources:
            return self._sources["tool_use"]
        if "default" in self._sources:
            return self._sources["default"]
        names = ", ".join(sorted(self._sources)) or "none"
        raise InvalidRequest(
            f"this model has no default chat template (it has: {names}); send chat_template, "
            "or use /v1/completions",
            param="chat_template",
        )


def load_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate:
    """chat_template.jinja and additional_chat_templates/ win over tokenizer_config.json."""
    sources: dict[str, str] = {}
    configured = tokenizer_config.get("chat_template")
    if isinstance(configured, str):
        sources["default"] = configured
    elif isinstance(configured, list):
        sources = {entry["name"]: entry["template"] for entry in configured}
    single = folder / "chat_template.jinja"
    if single.is_file():
        sources = {"default": single.read_text(encoding="utf-8")}
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = path.read_text(encoding="utf-8")
    return ChatTemplate(sources, _special_tokens(tokenizer_config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Written either as a string or as an object with `content`."""
    found = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


@lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[jinja2.Template, bool]:
    return _environment.from_string(source), _iterates_over_content(_environment.parse(source))


def _iterates_over_content(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's content, so wants parts and not a string."""
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, set()):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    while isinstance(node, (nodes.Filter, nodes.Test)):
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


def shape_message(message: Mapping[str, Any], wants_parts: bool) -> dict[str, Any]:
    """Raises InvalidRequest for parts that are not text and tool calls that are not functions."""
    role = message["role"]
    texts = _texts(message.get("content"))
    shaped: dict[str, Any] = {"role": role}
    if wants_parts and role != "tool":
        shaped["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        shaped["content"] = "\n".join(texts)
    if role == "assistant":
        calls = [_shape_call(call) for call in message.get("tool_calls") or ()]
        if calls:
            shaped["tool_calls"] = calls
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        if reasoning is not None:
            shaped["reasoning"] = shaped["reasoning_content"] = reasoning
    for name in ("tool_call_id",) if role == "tool" else ():
        if message.get(name) is not None:
            shaped[name] = message[name]
    if message.get("name") is not None:
        shaped["name"] = message["name"]
    return shaped


def _texts(content: Any) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    texts = []
    for part in content:
        kind = part.get("type", "text")
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise InvalidRequest(f"messages hold a content part of type {kind!r}; only text is served here",
                                 param="messages")  # fmt: skip
        texts.append(text)
    return texts


def _shape_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise InvalidRequest("assistant tool_calls must be of type function", param="messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            # It is history: refusing it would refuse each later turn too. vLLM does the same.
            arguments = {}
    if not isinstance(arguments, dict):
        arguments = {}
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_final(conversation: list[dict[str, Any]]) -> None:
    if not conversation or not conversation[-1]["content"]:
        raise InvalidRequest("continue_final_message needs a last message with content", param="messages")
    final = conversation[-1]
    if isinstance(final["content"], str):
        final["content"] += _CONTINUE_TAG
    else:
        final["content"][-1]["text"] += _CONTINUE_TAG


def _cut_final(rendered: str) -> str:
    """Everything after the last message's own text goes, so that the model continues it."""
    tag = rendered.rfind(_CONTINUE_TAG.strip())
    if tag < 0:
        raise InvalidRequest(
            "the chat template does not print the last message", param="continue_final_message"
        )
    # A template that strips messages strips the tag's blank too; then the text has lost its own.
    kept_blank = rendered[tag : tag + len(_CONTINUE_TAG)] == _CONTINUE_TAG
    return rendered[:tag] if kept_blank else rendered[:tag].rstrip()
