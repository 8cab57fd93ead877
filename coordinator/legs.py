"""What workers are told to start, and how much of a lease is left when they are. No state."""

from __future__ import annotations

import msgspec

from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import KvSource, PrefillFinished, RegisterWorker, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec
from coordinator.first_token import prefill_spec, reason_for_decode
from coordinator.request import Request

MIN_DEADLINE_S = 1e-3
"""Left of one that has passed while the request ran: it is then the most urgent there is."""


def start_prefill(request: Request, now_s: float) -> StartPrefill:
    is_token_wanted = request.next_token_by is WorkerRole.PREFILL
    return StartPrefill(
        handoff_id=request.handoff_id,
        request_id=request.request_id,
        prompt_token_ids=request.context(),
        sampling=prefill_spec(_sampling_left(request, now_s), is_token_wanted=is_token_wanted),
        keep_kv=request.needs_decode,
        num_given_tokens=request.num_given_tokens,
    )


def start_decode(
    request: Request, kv_source: KvSource | None, sent_s: float | None, now_s: float
) -> StartDecode:
    """`sent_s` is on the worker's clock."""
    return StartDecode(
        handoff_id=request.handoff_id,
        request_id=request.request_id,
        prompt_token_ids=request.context(),
        sampling=_sampling_left(request, now_s),
        kv_source=kv_source,
        # What a prefill worker of this attempt gave is whole characters, and no stop string is looked for.
        num_given_tokens=request.num_output_tokens if request.is_resumed else 0,
        sent_s=sent_s,
    )


def _sampling_left(request: Request, now_s: float) -> SamplingSpec:
    """The client's limits less what it has. Workers count a deadline from when they are told; what passed
    before is taken off."""
    sampling = request.sampling_left()
    if sampling.service is None or request.deadline_s is None:
        return sampling
    left_s = max(MIN_DEADLINE_S, request.deadline_s - now_s)
    return msgspec.structs.replace(
        sampling, service=msgspec.structs.replace(sampling.service, deadline_s=left_s)
    )


def reason_to_pull(request: Request, source: RegisterWorker, destination: RegisterWorker) -> str | None:
    """None: between these two this request's KV can be streamed. Prompt logprobs would make the decode engine
    compute the whole prompt, and a prompt that leaves room for one token only is over with it."""
    if source.stream_params is None:
        return "the prefill worker does not stream"
    if destination.stream_params is None:
        return "the decode worker does not stream"
    if request.wants_prompt_logprobs:
        return "prompt logprobs"
    if request.num_context_tokens + 1 >= source.capacity.max_model_len:
        return "the prompt leaves room for one token"
    return None


def stream_source(
    request: Request, source: RegisterWorker, destination: RegisterWorker, lease_s: float
) -> KvSource:
    """What the decode worker is told when the prefill begins, if there is no `reason_to_pull`."""
    assert source.stream_params is not None
    num_blocks = -(-request.num_context_tokens // source.layout.block_size_tokens)
    return KvSource(
        lease_s=lease_s,
        num_tokens=request.num_context_tokens,
        num_bytes=num_blocks * source.capacity.kv_bytes_per_block,
        transfer_params=source.stream_params,
        is_streamed=True,
        has_first_token=source.streams_first_token
        and destination.streams_first_token
        and reason_for_decode(request.sampling_left(), is_streamed=True) is None,
    )


def with_lease_left(request: Request, message: PrefillFinished, now_s: float) -> KvSource | None:
    """The source with the part of its lease that is certainly left: all time since dispatch that the
    worker's engine does not account for may have passed after the lease began, in a queue."""
    source = message.kv_source
    if source is None or request.started_s is None:
        return source
    lost_s = now_s - request.started_s - message.queue_s - message.prefill_s
    return msgspec.structs.replace(source, lease_s=max(0.0, source.lease_s - max(0.0, lost_s)))
