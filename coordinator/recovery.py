"""What to do about an attempt that failed: one rule, explicit policy, bounded. No state.

    what failed                                what follows                            policy
    ───────────                                ────────────                            ──────
    prefill, or its worker while KV is read    the same again, by the normal way       always
    the hand-off: KV did not arrive in time    computed again on a decode worker       transfer_failure_policy
    the decode worker: lost, failed, silent    go on from the tokens the client has    decode_loss_policy

Going on means a new attempt whose prompt is the prompt and all tokens given. It takes the normal way, so
whoever holds that prefix is likely to compute it, and what its engines add is what the lost one would have
added, unless something about the request tells output from prompt or remembers more than tokens. Those
requests are refused by name (`why_immovable`):

    seeded sampling    the random stream would start over
    penalties          presence and frequency count output tokens only
    bad words          a match may span the seam
    structured output  the grammar's state is lost

Stop strings are no obstacle, neither is half a character: an engine is told how much of its prompt is
output, and reads its text again (`StartDecode.num_given_tokens`). Several choices of one request are
requests of their own, each is moved by itself.

Attempts are bounded by `max_attempts` in a row without progress. One that gave FRUITFUL_TOKENS does not
count: a long answer may survive any number of losses, while a request that kills what it meets has no more
tries than before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from baton.contract.errors import CannotResume, PhaseTimeout, ServingError, TransferFailed, WorkerLost
from baton.contract.lifecycle import RequestState
from baton.contract.sampling import SamplingSpec
from coordinator.request import Request

FRUITFUL_TOKENS = 16


class Remedy(Enum):
    PREFILL = "prefill"
    RECOMPUTE = "recompute"
    RESUME = "resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPolicy:
    max_attempts: int
    transfer_failure_policy: Literal["recompute", "fail"]
    decode_loss_policy: Literal["resume", "fail"]


def remedy_for(
    request: Request, error: ServingError, worker_id: str | None, policy: RecoveryPolicy
) -> Remedy | ServingError:
    """`worker_id`: whose failure it is, if that is known. An error: the request ends with it."""
    if not error.retryable:
        return error
    state = request.state
    is_handoff = state is RequestState.HANDING_OFF and not isinstance(error, WorkerLost)
    is_decode_lost = state is RequestState.DECODING or (
        state is RequestState.HANDING_OFF and not is_handoff and worker_id == request.decode_worker
    )
    if is_handoff and policy.transfer_failure_policy == "fail":
        return error
    if is_decode_lost and policy.decode_loss_policy == "fail":
        return error
    has_tokens = request.num_output_tokens > 0
    if has_tokens:
        reason = why_immovable(request.submission.sampling)
        if reason is not None:
            return CannotResume(
                f"{error.message}; it cannot go on elsewhere: {reason}",
                phase=error.phase,
                worker_id=error.worker_id,
            )
    is_fruitful = request.num_output_tokens - request.num_given_tokens >= FRUITFUL_TOKENS
    if not is_fruitful and request.num_fruitless_attempts >= policy.max_attempts:
        return error
    if is_handoff and request.needs_decode:  # the last token alone is a prefill worker's job
        return Remedy.RECOMPUTE
    return Remedy.RESUME if has_tokens else Remedy.PREFILL


def is_failed_handoff(request: Request, error: ServingError) -> bool:
    """The KV did not get from the one worker to the other, whoever's fault it is."""
    if request.kv_source is None or request.prefill_worker is None or request.decode_worker is None:
        return False
    is_late = isinstance(error, PhaseTimeout) and request.state is RequestState.HANDING_OFF
    return is_late or isinstance(error, TransferFailed)


def give_back(request: Request, remedy: Remedy, error: ServingError, worker_id: str | None) -> None:
    """Prepare the request for its next attempt."""
    if request.num_output_tokens - request.num_given_tokens >= FRUITFUL_TOKENS:
        request.num_fruitless_attempts = 0
    request.last_error = error
    request.is_recomputed = remedy is Remedy.RECOMPUTE
    if request.num_output_tokens > request.num_given_tokens:
        request.hits = None  # they were of a shorter prompt
    if worker_id is not None and not isinstance(error, WorkerLost):
        # Also where it is only suspected: one that fails all it is given always has the smallest batch.
        request.unwanted_workers.add(worker_id)


def why_immovable(sampling: SamplingSpec) -> str | None:
    if sampling.seed is not None and sampling.temperature > 0:
        return "seeded sampling would start its random stream over"
    if sampling.presence_penalty or sampling.frequency_penalty:
        return "penalties count output tokens only"
    if sampling.bad_words:
        return "bad words may span the tokens before and after"
    if sampling.structured_output is not None:
        return "structured output keeps its state in the engine"
    return None


def waited_in_vain(request: Request, limit_s: float, worker_id: str | None) -> PhaseTimeout:
    """No progress in its state for so long."""
    phase = request.state.value
    on = f" on worker {worker_id}" if worker_id else ""
    is_retry = request.state is RequestState.QUEUED and request.last_error is not None
    after = f", after {request.last_error}" if is_retry else ""
    return PhaseTimeout(
        f"no progress in {phase} for {limit_s:g} s{on}{after}", phase=phase, worker_id=worker_id
    )
