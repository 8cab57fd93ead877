"""POST /v1/chat/completions, and the rendering of conversations that /tokenize shares."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from baton.contract.errors import InvalidRequest, ServingError, UnsupportedFeature
from baton.contract.sampling import StructuredOutput
from baton.contract.tokens import num_token_ids
from coordinator.http.answer import AnswerStyle, Prompt
from coordinator.http.exchange import Exchange
from coordinator.http.openai_schema import BodyDecoder, ChatBody, ChatTemplateBody
from coordinator.http.requests import Door, begin, served_model, token_limits
from coordinator.http.sampling_rules import (
    TokenLimits,
    check_supported,
    num_choices,
    output_budget,
    sampling_spec,
    structured_output,
)
from coordinator.http.tool_calls import ToolCallStyle, tool_schema, tool_style
from coordinator.tokenizer import Tokenizer

_decoder = BodyDecoder(ChatBody)


def chat(door: Door, exchange: Exchange) -> None:
    body = cast(ChatBody, _decoder.decode(exchange.request.body))
    facts = door.intake.facts()
    model = served_model(body.model, door.names)
    limits = token_limits(facts, door.tokenizer)
    _check(body)
    num_choices(body, 1, door.settings)
    tools = tool_style(body, door.settings.tool_call_parser)
    constraint = _constraint(body, tools)

    def encode(tokenizer: Tokenizer) -> Prompt:
        text = render(tokenizer, body)
        tokenizer.check_length(text, limits.max_model_len)
        # The template has written the special tokens.
        packed = tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
        if not packed:
            raise InvalidRequest("the conversation has no tokens", param="messages")
        return Prompt(token_ids=packed)

    def encoded(prompt: Prompt | ServingError) -> None:
        with door.guarded(exchange):
            if isinstance(prompt, ServingError):
                raise prompt
            if not exchange.is_done:
                after = token_limits(facts, door.tokenizer)
                _begin(door, exchange, body, model, after, prompt, tools, constraint)

    door.tokenizer.run(encode, num_chars(body), encoded)


def num_chars(body: ChatTemplateBody | ChatBody) -> int:
    """How much text there is to render and encode, roughly: decides whether a thread is worth it."""
    if body.tools or body.chat_template:
        return 1 << 20
    return sum(len(m.content) if isinstance(m.content, str) else 1 << 10 for m in body.messages)


def render(tokenizer: Tokenizer, body: ChatTemplateBody | ChatBody) -> str:
    """The prompt text. Raises InvalidRequest."""
    if not body.messages:
        raise InvalidRequest("messages is missing or empty", param="messages")
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other",
            param="add_generation_prompt",
        )
    template = tokenizer.chat_template
    if template is None:
        raise UnsupportedFeature("this model has no chat template; use /v1/completions", param="messages")
    extra = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", body.reasoning_effort)
        extra.setdefault("enable_thinking", body.reasoning_effort != "none")
    return template.render(
        [_as_dict(message) for message in body.messages],
        tools=[_tool_as_dict(tool) for tool in body.tools] if body.tools else None,
        source=body.chat_template,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        documents=body.documents,
        extra=extra,
    )


def _as_dict(message: Any) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}


def _tool_as_dict(tool: Any) -> dict[str, Any]:
    """vLLM shows templates description and parameters even when null, strict only when given."""
    function = tool.function
    shown: dict[str, Any] = {
        "name": function.name, "description": function.description, "parameters": function.parameters,
    }  # fmt: skip
    if function.strict is not None:
        shown["strict"] = function.strict
    return {"type": "function", "function": shown}


def _check(body: ChatBody) -> None:
    check_supported(body)
    if body.echo:
        raise UnsupportedFeature("echo is not served for chat", param="echo")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream=true", param="stream_options")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
    if body.stream and body.prompt_logprobs:
        raise InvalidRequest("prompt_logprobs is not available with stream=true", param="prompt_logprobs")


def _constraint(body: ChatBody, tools: ToolCallStyle | None) -> StructuredOutput | None:
    constraint = structured_output(body.response_format, body.structured_outputs)
    schema = tool_schema(tools, body.tools or [])
    if schema is None:
        return constraint
    if constraint is not None:
        raise InvalidRequest("a forced tool and structured output exclude each other", param="tool_choice")
    return StructuredOutput(json_schema=schema)


def _begin(
    door: Door, exchange: Exchange, body: ChatBody, model: str, limits: TokenLimits, prompt: Prompt,
    tools: ToolCallStyle | None, constraint: StructuredOutput | None,
) -> None:  # fmt: skip
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    spec = sampling_spec(
        body, max_tokens=output_budget(asked, num_token_ids(prompt.token_ids), limits, name),
        logprobs=num_logprobs, prompt_logprobs=body.prompt_logprobs,
        structured_output=constraint, limits=limits,
    )  # fmt: skip
    options = body.stream_options
    style = AnswerStyle(
        is_chat=True, model=model,
        include_usage=bool(options and options.include_usage),
        has_continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        num_logprobs=num_logprobs, shows_prompt_logprobs=body.prompt_logprobs is not None,
        shows_token_ids=bool(body.return_token_ids), names_tokens_by_id=bool(body.return_tokens_as_token_ids),
        tools=tools,
    )  # fmt: skip
    n = num_choices(body, 1, door.settings)
    begin(door, exchange, style, [prompt], [spec], n, bool(body.stream))
