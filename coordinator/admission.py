"""Whether a request can be served at all: said before anything is computed for it, with numbers."""

from __future__ import annotations

from baton.contract.errors import (
    Draining,
    DuplicateRequest,
    InvalidRequest,
    NoWorkers,
    PromptTooLong,
)
from coordinator.fleet import FleetView
from coordinator.request import Request


def check_acceptable(request: Request, fleet: FleetView, *, is_draining: bool, is_known: bool) -> None:
    """Raises Draining, DuplicateRequest, NoWorkers, InvalidRequest or PromptTooLong. A full queue is
    not this function's business: it depends on when one asks, not on the request."""
    sampling, num_prompt = request.submission.sampling, request.num_prompt_tokens
    if is_draining:
        raise Draining("this coordinator is shutting down and takes no new requests")
    if is_known:
        raise DuplicateRequest(f"request id {request.request_id!r} is already in flight")
    limit = fleet.max_model_len
    if limit is None or not fleet.has_pair:
        raise NoWorkers(fleet.why_not_ready() or "no worker is ready")
    if num_prompt < 1:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if num_prompt + 1 > limit:
        raise PromptTooLong(
            f"prompt has {num_prompt} tokens, this fleet accepts {limit - 1} and one of output",
            param="prompt",
        )
    if sampling.max_tokens < 1 or num_prompt + sampling.max_tokens > limit:
        raise InvalidRequest(
            f"max_tokens is {sampling.max_tokens}; with a prompt of {num_prompt} tokens this fleet "
            f"accepts 1 to {limit - num_prompt}",
            param="max_tokens",
        )
    for phase, num_tokens in fleet.largest_cache_tokens.items():
        if num_prompt + 1 > num_tokens:
            raise PromptTooLong(
                f"prompt has {num_prompt} tokens, the largest {phase.value} worker holds "
                f"{num_tokens} in its KV cache",
                param="prompt",
            )
