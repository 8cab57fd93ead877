"""What a client may ask of generation, named as vLLM names it. One spec describes one sequence:
the doors turn `n` and prompt batches into several requests."""

from __future__ import annotations

from typing import Any

import msgspec


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
