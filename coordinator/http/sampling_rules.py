"""From a request body to a SamplingSpec: every range and contradiction is found here, before any
prefill is paid. Ranges are vLLM's; messages give the numbers.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from baton.contract.errors import InvalidRequest, PromptTooLong, UnsupportedFeature
from baton.contract.sampling import (
    INT32_MAX,
    RANGES,
    Range,
    SamplingSpec,
    StructuredOutput,
    check_min_tokens,
    check_range,
    check_service,
    check_stop_strings,
)
from coordinator.http.limits import HttpSettings
from coordinator.http.openai_schema import GenerationBody, ResponseFormat, StructuredOutputs

_TEMPERATURE = Range(0, 2)
"""OpenAI's; vLLM itself goes higher."""

_RANGED = tuple(name for name in RANGES if name not in ("logprobs", "prompt_logprobs"))
"""Only what a client gave is looked at: most requests give two or three of these."""

_UNSUPPORTED = (
    "use_beam_search", "truncate_prompt_tokens", "logprob_token_ids", "cache_salt",
    "repetition_detection", "thinking_token_budget", "watermarking",
)  # fmt: skip


class TokenLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet accepts."""

    max_model_len: int
    max_token_id: int | None
    """None: the vocabulary is not known here."""


def check_supported(body: GenerationBody) -> None:
    for name in _UNSUPPORTED:
        if getattr(body, name):
            raise UnsupportedFeature(f"{name} is not served here", param=name)


def num_choices(body: GenerationBody, num_prompts: int, settings: HttpSettings) -> int:
    n = 1 if body.n is None else body.n
    if n < 1:
        raise InvalidRequest(f"n is {n}, at least 1 is needed", param="n")
    if n * num_prompts > settings.max_sequences:
        raise InvalidRequest(
            f"{num_prompts} prompts x n={n} are {num_prompts * n} sequences, "
            f"one request may have {settings.max_sequences}",
            param="n" if n > 1 else "prompt",
        )
    return n


def output_budget(asked: int | None, num_prompt_tokens: int, limits: TokenLimits, param: str) -> int:
    """max_tokens for one prompt; None asks for all that fits."""
    room = limits.max_model_len - num_prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {num_prompt_tokens} tokens, this fleet accepts {limits.max_model_len} "
            "for prompt and output together",
            param="prompt",
        )
    if asked is None:
        return room
    if asked < 1:
        raise InvalidRequest(f"{param} is {asked}, at least 1 is needed", param=param)
    if asked > room:
        raise PromptTooLong(
            f"the prompt has {num_prompt_tokens} tokens and {param} is {asked}: "
            f"{num_prompt_tokens + asked} together, this fleet accepts {limits.max_model_len}",
            param=param,
        )
    return asked


def sampling_spec(
    body: GenerationBody, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None,
    structured_output: StructuredOutput | None, limits: TokenLimits,
) -> SamplingSpec:  # fmt: skip
    """Raises InvalidRequest naming the field."""
    given: dict[str, Any] = {}
    for name in _RANGED:
        value = getattr(body, name)
        if value is not None:
            check_range(name, value, _TEMPERATURE if name == "temperature" else None)
            given[name] = value
    if body.min_tokens is not None:
        check_min_tokens(body.min_tokens, max_tokens)
        given["min_tokens"] = body.min_tokens
    if body.service is not None:
        check_service(body.service)
        given["service"] = body.service
    if body.stop is not None:
        given["stop"] = _stops(body.stop)
    if body.stop_token_ids:
        given["stop_token_ids"] = _token_ids("stop_token_ids", body.stop_token_ids, limits)
    if body.logit_bias:
        given["logit_bias"] = _logit_bias(body.logit_bias, limits)
    if body.bad_words:
        given["bad_words"] = _bad_words(body.bad_words)
    if body.allowed_token_ids is not None:
        given["allowed_token_ids"] = _allowed(body.allowed_token_ids, limits)
    return SamplingSpec(
        max_tokens=max_tokens,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        logprobs=_num_logprobs("logprobs", logprobs),
        prompt_logprobs=_num_logprobs("prompt_logprobs", prompt_logprobs),
        skip_special_tokens=body.skip_special_tokens is not False,
        spaces_between_special_tokens=body.spaces_between_special_tokens is not False,
        structured_output=structured_output,
        **given,
    )


def structured_output(
    response_format: ResponseFormat | None, outputs: StructuredOutputs | None
) -> StructuredOutput | None:
    """`response_format` wins over `structured_outputs`, as in vLLM."""
    given: dict[str, object] = {}
    if outputs is not None:
        if (
            outputs.whitespace_pattern
            or outputs.disable_any_whitespace
            or outputs.disable_additional_properties
        ):
            raise UnsupportedFeature(
                "structured_outputs: whitespace and additional-property options are not served here",
                param="structured_outputs",
            )
        given = {
            "json_schema": outputs.json, "regex": outputs.regex, "choice": outputs.choice,
            "grammar": outputs.grammar, "json_object": outputs.json_object,
            "structural_tag": outputs.structural_tag,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        if not given and (response_format is None or response_format.type == "text"):
            raise InvalidRequest("structured_outputs names no constraint", param="structured_outputs")
    if response_format is not None:
        given.update(_from_response_format(response_format))
    if not given:
        return None
    if len(given) > 1:
        names = ", ".join(sorted(given))
        raise InvalidRequest(f"one kind of constraint may be given, not {names}", param="structured_outputs")
    (name, value) = next(iter(given.items()))
    _check_constraint(name, value)
    return StructuredOutput(**given)  # type: ignore[arg-type]


def _from_response_format(format: ResponseFormat) -> dict[str, object]:
    if format.type == "text":
        return {}
    if format.type == "json_object":
        return {"json_object": True}
    if format.type == "json_schema":
        if format.json_schema is None or format.json_schema.schema is None:
            raise InvalidRequest(
                "response_format of type json_schema needs json_schema.schema", param="response_format"
            )
        return {"json_schema": format.json_schema.schema}
    tag: dict[str, object] = {"type": "structural_tag"}
    if format.format is not None:
        tag["format"] = format.format
    elif format.structures is not None and format.triggers is not None:
        tag |= {"structures": format.structures, "triggers": format.triggers}
    else:
        raise InvalidRequest(
            "response_format of type structural_tag needs format, or structures and triggers",
            param="response_format",
        )
    return {"structural_tag": json.dumps(tag)}


def _check_constraint(name: str, value: object) -> None:
    if name == "choice" and not value:
        raise InvalidRequest("structured_outputs.choice is empty", param="structured_outputs")
    if name in ("regex", "grammar", "structural_tag") and not value:
        raise InvalidRequest(f"structured_outputs.{name} is empty", param="structured_outputs")
    if name == "json_object" and value is not True:
        raise InvalidRequest("structured_outputs.json_object must be true", param="structured_outputs")
    if isinstance(value, str) and name in ("json_schema", "structural_tag"):
        try:
            is_object = isinstance(msgspec.json.decode(value), dict)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(
                f"structured_outputs.{name} is not JSON: {error}", param="structured_outputs"
            ) from error
        if not is_object:
            raise InvalidRequest(f"structured_outputs.{name} is no JSON object", param="structured_outputs")


def _stops(stop: str | list[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    check_stop_strings(stops)
    return stops


def _token_ids(name: str, ids: list[int], limits: TokenLimits) -> list[int]:
    top = INT32_MAX if limits.max_token_id is None else limits.max_token_id
    for token_id in ids:
        if not 0 <= token_id <= top:
            raise InvalidRequest(f"{name} holds {token_id}, ids go from 0 to {top}", param=name)
    return ids


def _allowed(ids: list[int], limits: TokenLimits) -> list[int]:
    if not ids:
        raise InvalidRequest("allowed_token_ids is empty", param="allowed_token_ids")
    return _token_ids("allowed_token_ids", ids, limits)


def _num_logprobs(name: str, value: int | None) -> int | None:
    if value is not None:
        check_range(name, value)
    return value


def _logit_bias(bias: dict[str, float], limits: TokenLimits) -> dict[int, float]:
    cleaned: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias has key {key[:40]!r}, not a token id", param="logit_bias")
        # Clamped, as OpenAI documents the range and vLLM applies it.
        cleaned[int(key)] = min(100.0, max(-100.0, value))
    _token_ids("logit_bias", list(cleaned), limits)
    return cleaned


def _bad_words(words: list[str]) -> list[str]:
    if not all(words):
        raise InvalidRequest("bad_words holds an empty string", param="bad_words")
    return words
