"""What a client may ask of generation, named as vLLM names it. One spec describes one sequence:
the doors turn `n` and prompt batches into several requests."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class ServiceWish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request asks of those who order work. The deadline counts everywhere, the rest on workers with
    a preempting scheduler only (docs/scheduling.md)."""

    priority: int = 0
    """Smaller is served first, among requests of one key."""
    key: str = ""
    """Tenant or session: service is shared between keys, however many requests each sends."""
    deadline_s: float | None = None
    """The whole answer is wanted within so many seconds of the request's arrival. Refused at once where that
    is out of reach, ended while it still waits; for one that runs an order, not a promise."""
    expected_output_tokens: int | None = None
    """A guess of the answer's length. Wrong ones cost little."""


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
    service: ServiceWish | None = None
    """Not sampling, but it travels with it: from either door to both legs."""


MAX_SERVICE_KEY = 128
"""Characters."""
MAX_STOP_STRINGS = 16
"""Each stop string is searched for at each token."""
MAX_LOGPROBS = 20
"""vLLM's own default bound."""

INT32_MAX = 2**31 - 1


class Range(NamedTuple):
    low: float
    high: float
    is_low_excluded: bool = False

    def __contains__(self, value: object) -> bool:
        # NaN fails both comparisons.
        assert isinstance(value, int | float)
        return self.low <= value <= self.high and not (self.is_low_excluded and value == self.low)

    def __str__(self) -> str:
        if self.is_low_excluded:
            return f"more than {self.low} and at most {self.high}"
        return f"{self.low} to {self.high}"


RANGES: dict[str, Range] = {
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, is_low_excluded=True),
    "top_k": Range(-1, INT32_MAX),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 100, is_low_excluded=True),
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
    "seed": Range(-(2**63), 2**63 - 1),
}
"""As vLLM checks them; the engine refuses what is outside, only later."""


def check_range(name: str, value: float, accepted: Range | None = None) -> None:
    """Raises InvalidRequest naming the field, its value and what is accepted."""
    accepted = RANGES[name] if accepted is None else accepted
    if value not in accepted:
        raise _refused(name, value, str(accepted))


def check_sampling(spec: SamplingSpec) -> None:
    """Raises InvalidRequest as `check_range`. The upper end of max_tokens depends on prompt and fleet
    and is checked where both are known."""
    for name in RANGES:
        value = getattr(spec, name)
        if value is not None:
            check_range(name, value)
    if spec.max_tokens < 1:
        raise _refused("max_tokens", spec.max_tokens, "at least 1")
    check_min_tokens(spec.min_tokens, spec.max_tokens)
    check_stop_strings(spec.stop)
    if spec.service is not None:
        check_service(spec.service)
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


def check_service(wish: ServiceWish) -> None:
    if abs(wish.priority) > INT32_MAX:
        raise _refused("priority", wish.priority, f"{-INT32_MAX} to {INT32_MAX}")
    if len(wish.key) > MAX_SERVICE_KEY:
        raise InvalidRequest(
            f"service.key has {len(wish.key)} characters, at most {MAX_SERVICE_KEY} are accepted",
            param="service",
        )
    if wish.deadline_s is not None and not 0 < wish.deadline_s < float("inf"):
        raise _refused("deadline_s", wish.deadline_s, "more than 0 seconds")
    if wish.expected_output_tokens is not None and wish.expected_output_tokens < 1:
        raise _refused("expected_output_tokens", wish.expected_output_tokens, "at least 1")


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    if not 0 <= min_tokens <= max_tokens:
        raise _refused("min_tokens", min_tokens, f"0 to max_tokens ({max_tokens})")


def check_stop_strings(stop: list[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"stop has {len(stop)} strings, at most {MAX_STOP_STRINGS} are accepted", param="stop"
        )
    if not all(stop):
        raise InvalidRequest("stop holds an empty string", param="stop")


def _refused(name: str, value: object, accepted: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value}, accepted: {accepted}", param=name.split()[0])
