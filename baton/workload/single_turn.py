"""Requests that know nothing of each other: lengths, a rate and its burstiness.

With `shapes` from a file (pairs of lengths that were seen together) prompt and output stay correlated;
from two distributions they are independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from baton.workload.lengths import Lengths
from baton.workload.retiming import gamma_gaps
from baton.workload.trace import Trace, WorkloadError


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleTurnWorkload:
    num_requests: int
    rate_per_s: float
    prompt: Lengths
    output: Lengths
    gap_cv: float = 1.0
    """Coefficient of variation of the gaps: 0 evenly paced, 1 Poisson, more: bursts."""

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise WorkloadError(f"num_requests is {self.num_requests}, expected at least 1")

    def generate(self, seed: int) -> Trace:
        rng = np.random.default_rng(seed)
        # Lengths first: the same requests whatever the rate, so that runs at two rates can be paired.
        prompts, outputs = (lengths.sample(rng, self.num_requests) for lengths in (self.prompt, self.output))
        return Trace(
            name="single-turn",
            arrival_s=np.cumsum(gamma_gaps(self.num_requests, self.rate_per_s, self.gap_cv, rng)),
            num_prompt_tokens=prompts,
            num_output_tokens=outputs,
        )


def resampled(trace: Trace, num_requests: int, rate_per_s: float, *, cv: float = 1.0, seed: int) -> Trace:
    """So many requests with lengths drawn (in pairs, with replacement) from `trace`, which may be
    shorter. Prefixes and sessions are lost: copies of a request would hit their own blocks."""
    if num_requests < 1:
        raise WorkloadError(f"num_requests is {num_requests}, expected at least 1")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(trace), num_requests)
    return Trace(
        name=trace.name,
        arrival_s=np.cumsum(gamma_gaps(num_requests, rate_per_s, cv, rng)),
        num_prompt_tokens=trace.num_prompt_tokens[drawn],
        num_output_tokens=trace.num_output_tokens[drawn],
    )
