"""A fitted model: one coefficient per term of `StepWork`."""

from __future__ import annotations

from dataclasses import dataclass

from baton.step_time.base import StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStepTime:
    """Sum of the terms. The form of DistServe's fit (its appendix A), with prefill and decode added
    up when they share a step. `base_s` is paid by every step that does anything."""

    base_s: float
    per_prefill_token_s: float = 0.0
    per_prefill_pair_s: float = 0.0
    per_decode_s: float = 0.0
    per_context_token_s: float = 0.0
    num_stages: int = 1
    """Pipeline stages of equal length."""

    def __post_init__(self) -> None:
        for name in (
            "base_s",
            "per_prefill_token_s",
            "per_prefill_pair_s",
            "per_decode_s",
            "per_context_token_s",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name):g}, a step cannot get faster by more work")
        if self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}, expected at least 1")

    def step_s(self, work: StepWork) -> float:
        if not work.num_prefill_tokens and not work.num_decodes:
            return 0.0
        return (
            self.base_s
            + self.per_prefill_token_s * work.num_prefill_tokens
            + self.per_prefill_pair_s * work.num_prefill_pairs
            + self.per_decode_s * work.num_decodes
            + self.per_context_token_s * work.num_context_tokens
        )

    def cadence_s(self, work: StepWork) -> float:
        return self.step_s(work) / self.num_stages
