"""What a client may ask of generation, named as vLLM names it. One spec describes one sequence:
the doors turn `n` and prompt batches into several requests."""

from __future__ import annotations

from typing import Any

import msgspec

from baton.contract.errors import InvalidRequest


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one field is set; meanings are vLLM's `StructuredOutputsParams`."""

    json_schema: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | None = None


class SamplingSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Defaults are vLLM's. `max_tokens` is resolved by the door: it is never "unlimited"."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of alternatives per output token (the sampled one always comes too); None: none."""
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] = []
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_output: StructuredOutput | None = None


MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "seed": (-(2**63), 2**63 - 1),
}
"""Inclusive, as vLLM checks them; the engine refuses what is outside, only later."""


def check_sampling(spec: SamplingSpec) -> None:
    """Raises InvalidRequest naming the field, its value and what is accepted. The upper end of
    max_tokens depends on prompt and fleet and is checked where both are known."""
    for name, (low, high) in _RANGES.items():
        value = getattr(spec, name)
        if value is not None and not low <= value <= high:
            raise _refused(name, value, f"{low:g} to {high:g}")
    if not 0.0 < spec.top_p <= 1.0:
        raise _refused("top_p", spec.top_p, "more than 0 and at most 1")
    if spec.top_k < -1:
        raise _refused("top_k", spec.top_k, "-1 or 0 (off), or a positive number")
    if not 0.0 < spec.repetition_penalty <= 100.0:
        raise _refused("repetition_penalty", spec.repetition_penalty, "more than 0 and at most 100")
    if spec.max_tokens < 1:
        raise _refused("max_tokens", spec.max_tokens, "at least 1")
    if not 0 <= spec.min_tokens <= spec.max_tokens:
        raise _refused("min_tokens", spec.min_tokens, f"0 to max_tokens ({spec.max_tokens})")
    if len(spec.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"stop has {len(spec.stop)} strings, at most {MAX_STOP_STRINGS} are accepted", param="stop"
        )
    if not all(spec.stop):
        raise InvalidRequest("stop holds an empty string", param="stop")
    if spec.logit_bias is not None:
        for token_id, bias in spec.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise _refused(f"logit_bias of token {token_id}", bias, "-100 to 100")
    if spec.structured_output is not None:
        fields = [name for name in spec.structured_output.__struct_fields__
                  if getattr(spec.structured_output, name) is not None]  # fmt: skip
        if len(fields) != 1:
            raise InvalidRequest(
                f"structured_output sets {len(fields)} constraints ({', '.join(fields)}), expected one",
                param="structured_output",
            )


def _refused(name: str, value: object, accepted: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value}, accepted: {accepted}", param=name.split()[0])
