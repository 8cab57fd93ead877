"""POST /v1/completions: text or token-id prompts, one or a batch."""

from __future__ import annotations

from typing import cast

from baton.contract.errors import InvalidRequest, ServingError, UnsupportedFeature
from baton.contract.tokens import num_token_ids, pack_token_ids
from coordinator.http.answer import AnswerStyle, Prompt
from coordinator.http.exchange import Exchange
from coordinator.http.openai_schema import BodyDecoder, CompletionBody
from coordinator.http.requests import Door, begin, served_model, token_limits
from coordinator.http.sampling_rules import (
    TokenLimits,
    check_supported,
    num_choices,
    output_budget,
    sampling_spec,
    structured_output,
)
from coordinator.tokenizer import Tokenizer, id_above

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, and vLLM's."""

_decoder = BodyDecoder(CompletionBody)


def complete(door: Door, exchange: Exchange) -> None:
    body = cast(CompletionBody, _decoder.decode(exchange.request.body))
    facts = door.intake.facts()
    model = served_model(body.model, door.names)
    limits = token_limits(facts, door.tokenizer)
    _check(body)
    given = _given_prompts(body)
    num_choices(body, len(given), door.settings)
    needs_text = any(isinstance(prompt, str) for prompt in given)
    if not needs_text and not body.echo:
        prompts = [Prompt(token_ids=_packed(cast("list[int]", ids))) for ids in given]
        _begin(door, exchange, body, model, limits, prompts)
        return

    def encode(tokenizer: Tokenizer) -> list[Prompt]:
        return [_encoded(tokenizer, prompt, body, limits) for prompt in given]

    def encoded(prompts: list[Prompt] | ServingError) -> None:
        with door.guarded(exchange):
            if isinstance(prompts, ServingError):
                raise prompts
            if not exchange.is_done:
                _begin(door, exchange, body, model, token_limits(facts, door.tokenizer), prompts)

    door.tokenizer.run(encode, sum(len(prompt) for prompt in given), encoded)


def _check(body: CompletionBody) -> None:
    check_supported(body)
    if body.suffix:
        raise UnsupportedFeature("suffix is not served here", param="suffix")
    if body.prompt_embeds is not None:
        raise UnsupportedFeature("prompt_embeds is not served here", param="prompt_embeds")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise UnsupportedFeature(f"best_of is {body.best_of}; only best_of = n is served", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream=true", param="stream_options")
    if body.stream and body.echo and body.logprobs is not None:
        raise UnsupportedFeature(
            "echo with logprobs is not served as a stream: a prompt's log probabilities come last",
            param="echo",
        )
    if body.stream and body.prompt_logprobs:
        raise InvalidRequest("prompt_logprobs is not available with stream=true", param="prompt_logprobs")


def _given_prompts(body: CompletionBody) -> list[str | list[int]]:
    """One entry per prompt. Mixed batches of text and token ids are allowed, as in vLLM's engine."""
    prompt = body.prompt
    if prompt is None or prompt == "" or prompt == []:
        raise InvalidRequest("prompt is missing or empty", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        # _packed refuses a list that holds anything but ids.
        return [cast("list[int]", prompt)]
    for number, entry in enumerate(prompt):
        if isinstance(entry, int):
            raise InvalidRequest(f"prompt {number} is a number among texts or lists", param="prompt")
        if not entry:
            raise InvalidRequest(f"prompt {number} is empty, at least one token is needed", param="prompt")
    return cast("list[str | list[int]]", prompt)


def _packed(ids: list[int]) -> bytes:
    try:
        return pack_token_ids(ids)
    except (OverflowError, TypeError) as error:
        wrong = next(entry for entry in ids if not _is_token_id(entry))
        raise InvalidRequest(
            f"prompt holds {str(wrong)[:40]}, token ids from 0 on are expected", param="prompt"
        ) from error


def _is_token_id(entry: object) -> bool:
    return isinstance(entry, int) and 0 <= entry < 2**32


def _encoded(
    tokenizer: Tokenizer, prompt: str | list[int], body: CompletionBody, limits: TokenLimits
) -> Prompt:
    """In a thread."""
    if isinstance(prompt, str):
        tokenizer.check_length(prompt, limits.max_model_len)
        packed = tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
        text = prompt
        if not packed:
            raise InvalidRequest("a prompt has no tokens", param="prompt")
    else:
        packed = _packed(prompt)
        _check_ids(packed, tokenizer.max_token_id)
        text = tokenizer.decode(prompt, skip_special_tokens=True) if body.echo else ""
    if not body.echo:
        return Prompt(token_ids=packed)
    names = None
    if body.logprobs is not None:
        first = int.from_bytes(packed[:4], "little")
        names = [tokenizer.decode([first])] + [""] * (num_token_ids(packed) - 1)
    return Prompt(token_ids=packed, text=text, token_names=names)


def _check_ids(packed: bytes, max_token_id: int | None) -> None:
    wrong = id_above(packed, max_token_id) if max_token_id is not None else None
    if wrong is not None:
        raise InvalidRequest(f"prompt holds token id {wrong}, the last is {max_token_id}", param="prompt")


def _begin(
    door: Door,
    exchange: Exchange,
    body: CompletionBody,
    model: str,
    limits: TokenLimits,
    prompts: list[Prompt],
) -> None:
    echoes_only = bool(body.echo) and body.max_tokens == 0
    asked = 1 if echoes_only else body.max_tokens
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is None and body.echo:
        prompt_logprobs = body.logprobs
    constraint = structured_output(body.response_format, body.structured_outputs)
    specs = []
    for prompt in prompts:
        _check_ids(prompt.token_ids, limits.max_token_id)
        max_tokens = output_budget(asked, num_token_ids(prompt.token_ids), limits, "max_tokens")
        if asked is None:
            max_tokens = min(DEFAULT_MAX_TOKENS, max_tokens)
        spec = sampling_spec(
            body, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs,
            structured_output=constraint, limits=limits,
        )  # fmt: skip
        specs.append(spec)
    options = body.stream_options
    style = AnswerStyle(
        is_chat=False, model=model,
        include_usage=bool(options and options.include_usage),
        has_continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        num_logprobs=body.logprobs, shows_prompt_logprobs=body.prompt_logprobs is not None,
        shows_token_ids=bool(body.return_token_ids), names_tokens_by_id=bool(body.return_tokens_as_token_ids),
        echoes=bool(body.echo), echoes_only=echoes_only,
    )  # fmt: skip
    n = num_choices(body, len(prompts), door.settings)
    begin(door, exchange, style, prompts, specs, n, bool(body.stream))
