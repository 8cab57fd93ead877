"""Between the contract's words and vLLM's: sampling, logprobs. Pure functions on vLLM's types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from baton.contract.messages import TokenLogprobs, TopLogprob
from baton.contract.sampling import SamplingSpec, StructuredOutput


def prefill_params(spec: SamplingSpec, kv_transfer_params: dict[str, Any] | None) -> SamplingParams:
    """One token. `min_tokens` beyond it is the decode leg's business; the first token's share is that
    it must not be an end token."""
    return _params(
        spec,
        max_tokens=1,
        min_tokens=min(1, spec.min_tokens),
        prompt_logprobs=spec.prompt_logprobs,
        kv_transfer_params=kv_transfer_params,
    )


def decode_params(spec: SamplingSpec, kv_transfer_params: dict[str, Any] | None) -> SamplingParams:
    """Prompt logprobs only of a prompt that is computed here: they need every position of it."""
    return _params(
        spec,
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        prompt_logprobs=None if kv_transfer_params else spec.prompt_logprobs,
        kv_transfer_params=kv_transfer_params,
    )


def _params(
    spec: SamplingSpec,
    *,
    max_tokens: int,
    min_tokens: int,
    prompt_logprobs: int | None,
    kv_transfer_params: dict[str, Any] | None,
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        repetition_penalty=spec.repetition_penalty,
        seed=spec.seed,
        stop=list(spec.stop) or None,
        stop_token_ids=list(spec.stop_token_ids) or None,
        include_stop_str_in_output=spec.include_stop_str_in_output,
        ignore_eos=spec.ignore_eos,
        logprobs=spec.logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=dict(spec.logit_bias) if spec.logit_bias else None,
        bad_words=list(spec.bad_words) or None,
        allowed_token_ids=list(spec.allowed_token_ids) if spec.allowed_token_ids is not None else None,
        skip_special_tokens=spec.skip_special_tokens,
        spaces_between_special_tokens=spec.spaces_between_special_tokens,
        structured_outputs=_structured_outputs(spec.structured_output),
        detokenize=True,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # made for one request and shared with nobody
        extra_args=_extra_args(spec, kv_transfer_params),
    )


def _extra_args(spec: SamplingSpec, kv_transfer_params: dict[str, Any] | None) -> dict[str, Any] | None:
    extra: dict[str, Any] = {}
    if kv_transfer_params:
        extra["kv_transfer_params"] = kv_transfer_params
    if spec.service is not None:
        # The scheduler's key, `mlfq_scheduler.OPTIONS`: not imported, it loads half of vLLM.
        extra["baton_scheduler"] = {
            "priority": spec.service.priority,
            "key": spec.service.key,
            "deadline_left_s": spec.service.deadline_s,
            "num_expected_output_tokens": spec.service.expected_output_tokens,
        }
    return extra or None


def _structured_outputs(wanted: StructuredOutput | None) -> StructuredOutputsParams | None:
    if wanted is None:
        return None
    return StructuredOutputsParams(
        json=wanted.json_schema,
        json_object=wanted.json_object,
        regex=wanted.regex,
        choice=wanted.choice,
        grammar=wanted.grammar,
        structural_tag=wanted.structural_tag,
    )


def token_logprobs(position: Mapping[int, Any]) -> TokenLogprobs:
    """vLLM puts the sampled token first and the others by rank; that order is the contract's."""
    return [
        TopLogprob(token_id=token_id, logprob=entry.logprob, rank=entry.rank, decoded=entry.decoded_token)
        for token_id, entry in position.items()
    ]


def output_logprobs(positions: Iterable[Mapping[int, Any]] | None) -> list[TokenLogprobs] | None:
    return None if positions is None else [token_logprobs(position) for position in positions]


def prompt_logprobs(
    positions: Iterable[Mapping[int, Any] | None] | None,
) -> list[TokenLogprobs | None] | None:
    """None where there is nothing to predict from: the first token."""
    if positions is None:
        return None
    return [None if position is None else token_logprobs(position) for position in positions]
