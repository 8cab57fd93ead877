"""Turns a caller's arguments into the one message the door takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.contract.codec import PROTOCOL_VERSION
from baton.contract.errors import InvalidRequest
from baton.contract.messages import SubmitRequest
from baton.contract.sampling import SamplingSpec, check_sampling
from baton.contract.tokens import pack_token_ids

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Text, token ids, or chat messages (`[{"role": "user", "content": "..."}]`)."""

DEFAULT_MAX_TOKENS = 128


def build(request_id: str, prompt: Prompt, model: str | None, options: dict[str, Any]) -> SubmitRequest:
    """Raises InvalidRequest for an unknown or impossible option before anything is sent."""
    unknown = sorted(set(options) - set(SamplingSpec.__struct_fields__))
    if unknown:
        raise InvalidRequest(
            f"unknown option {unknown[0]!r}; known: {', '.join(SamplingSpec.__struct_fields__)}",
            param=unknown[0],
        )
    sampling = SamplingSpec(**{"max_tokens": DEFAULT_MAX_TOKENS} | options)
    check_sampling(sampling)
    message = SubmitRequest(
        protocol_version=PROTOCOL_VERSION, request_id=request_id, model=model, sampling=sampling,
        **_prompt_field(prompt),
    )  # fmt: skip
    return message


def _prompt_field(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if prompt and isinstance(prompt[0], dict):
        return {"messages": list(prompt)}
    try:
        return {"prompt_token_ids": pack_token_ids(prompt)}  # type: ignore[arg-type]
    except (TypeError, OverflowError) as error:
        raise InvalidRequest(
            f"prompt is neither text, nor token ids, nor chat messages: {error}", param="prompt"
        ) from error
