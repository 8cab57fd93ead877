"""Request bodies as OpenAI and vLLM name their fields. Unknown fields are ignored.

msgspec checks types while it parses, so what reaches the handlers has the shape written here;
ranges and contradictions are `sampling_rules`' business. Fields that would change the answer but
that we cannot honour are listed too, in order to refuse them instead of ignoring them.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

import msgspec

from baton.contract.errors import InvalidRequest
from baton.contract.sampling import ServiceWish


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct):
    name: str | None = None
    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    format: Any = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct):
    """vLLM 0.32's `structured_outputs`."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class GenerationBody(msgspec.Struct):
    """What completions and chat share."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    service: ServiceWish | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    request_id: str | None = None

    # Refused when set: each would change the answer or promise something we do not keep.
    use_beam_search: bool | None = None
    truncate_prompt_tokens: int | None = None
    logprob_token_ids: list[int] | None = None
    cache_salt: str | None = None
    repetition_detection: Any = None
    thinking_token_budget: int | None = None
    watermarking: bool | None = None


class CompletionBody(GenerationBody):
    prompt: str | list[int | str | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None
    prompt_embeds: Any = None


class FunctionSpec(msgspec.Struct, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    function: FunctionSpec
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct):
    function: NamedFunction
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatTemplateBody(msgspec.Struct):
    """The fields that decide how a conversation becomes a prompt."""

    messages: list[ChatMessage] = []
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class ChatBody(GenerationBody):
    messages: list[ChatMessage] = []
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None


class TokenizeBody(ChatTemplateBody):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct):
    tokens: list[int]
    model: str | None = None


B = TypeVar("B")

_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


class BodyDecoder:
    """Decodes one kind of body; whatever is wrong becomes one sentence and the field's name."""

    def __init__(self, body_type: type[B]) -> None:
        self._decoder: msgspec.json.Decoder[B] = msgspec.json.Decoder(body_type)

    def decode(self, body: bytes) -> Any:
        """Raises InvalidRequest."""
        if not body:
            raise InvalidRequest("the body is empty, expected a JSON object")
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            found = _PATH.search(str(error))
            param = found["path"] if found else None
            raise InvalidRequest(_sentence(str(error), found), param=param or None) from error
        except UnicodeDecodeError as error:
            # error.start counts from the start of the string, not of the body.
            raise InvalidRequest(f"the body is not UTF-8: {error.reason}") from error
        except RecursionError as error:
            raise InvalidRequest("the body is nested too deeply") from error
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"the body of {len(body)} bytes is not JSON: {error}") from error


def _sentence(text: str, found: re.Match[str] | None) -> str:
    if found is None:
        return f"the body has the wrong shape: {text[0].lower()}{text[1:]}"
    rest = text[: found.start()]
    return f"{found['path'] or 'the body'}: {rest[0].lower()}{rest[1:]}"
