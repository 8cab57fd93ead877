"""What a prompt's first iteration costs, in decode tokens: the known part of a request's length.

FastServe profiles a table of first-iteration latencies over prompt lengths; the fit of it is a line,
with a quadratic term for long contexts. Dividing by the latency of a decode step turns it into the unit
in which service is counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.step_time import StepTime, StepWork, prefill_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstIteration:
    per_token: float = 0.0
    """Decode tokens that one prompt token is worth. Zero on a decode worker, whose prompts were
    computed elsewhere."""
    per_pair: float = 0.0
    """The same for each query-key pair of the prompt's attention."""

    def __post_init__(self) -> None:
        if self.per_token < 0 or self.per_pair < 0:
            raise ValueError(
                f"a longer prompt cannot be cheaper: {self.per_token:g} per token, {self.per_pair:g} per pair"
            )

    def prefill_share(self, num_tokens: int) -> float:
        """Of computing this many prompt tokens, beyond what any step costs."""
        return self.per_token * num_tokens + self.per_pair * prefill_pairs(num_tokens)

    def length(self, num_uncached_tokens: int) -> float:
        """Decode tokens that the first iteration lasts: one where nothing has to be computed."""
        return 1.0 + self.prefill_share(num_uncached_tokens)

    @classmethod
    def fitted(cls, samples: Sequence[tuple[int, float]]) -> FirstIteration:
        """The least-squares line through (prompt tokens, seconds of the first iteration). Its
        intercept is what a step costs anyway. Raises ValueError where there is no such line."""
        if len({num_tokens for num_tokens, _ in samples}) < 2:
            raise ValueError("a line needs first iterations of at least two prompt lengths")
        mean_tokens = sum(num_tokens for num_tokens, _ in samples) / len(samples)
        mean_s = sum(seconds for _, seconds in samples) / len(samples)
        covariance = sum((n - mean_tokens) * (seconds - mean_s) for n, seconds in samples)
        per_token_s = covariance / sum((n - mean_tokens) ** 2 for n, _ in samples)
        step_s = mean_s - per_token_s * mean_tokens
        if per_token_s < 0 or step_s <= 0:
            raise ValueError(
                f"first iterations do not lie on a line that rises from above zero: "
                f"{step_s:g} s + {per_token_s:g} s per token"
            )
        return cls(per_token=per_token_s / step_s)

    @classmethod
    def of(cls, step_time: StepTime, *, num_tokens: int = 1024) -> FirstIteration:
        """From a step-time model: the slope between no prompt and one of `num_tokens`."""
        decode_s = step_time.step_s(StepWork(num_decodes=1, num_context_tokens=num_tokens))
        prefill_s = step_time.step_s(
            StepWork(num_prefill_tokens=num_tokens, num_prefill_pairs=prefill_pairs(num_tokens))
        )
        return cls(per_token=max(0.0, prefill_s - decode_s) / decode_s / num_tokens)
