"""Whether a request can be served at all: said before anything is computed for it, with numbers."""

from __future__ import annotations

from baton.contract.errors import (
    DeadlineUnreachable,
    Draining,
    DuplicateRequest,
    InvalidRequest,
    NoWorkers,
    PromptTooLong,
)
from coordinator.deadline import Estimate
from coordinator.fleet import FleetView
from coordinator.request import Request
from coordinator.waiting_line import MAX_RETRY_AFTER_S, WaitingLine


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


def check_deadline(left_s: float, line: WaitingLine, service_s: float, now_s: float) -> None:
    """Raises DeadlineUnreachable: what cannot be in time would only take it from others."""
    estimate = Estimate(line_s=line.wait_s(now_s) or 0.0, service_s=service_s)
    if estimate.total_s > left_s:
        late_s = estimate.total_s - left_s
        raise DeadlineUnreachable(
            f"the deadline cannot be met: {estimate.sentence(left_s)}",
            param="service",
            # With the line gone there would be time enough; otherwise waiting changes nothing.
            retry_after_s=min(MAX_RETRY_AFTER_S, late_s) if estimate.service_s <= left_s else None,
        )
