"""What a step-time model is asked, and in which terms.

A step computes prompt tokens (chunks of one or several prompts), one token each for some decoding
sequences, or both. Four sums describe it; no model needs to know the single sequences.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class StepWork(NamedTuple):
    """One engine step of one worker, summed over its sequences."""

    num_prefill_tokens: int = 0
    """Prompt tokens computed in this step (cached ones are not computed)."""
    num_prefill_pairs: float = 0.0
    """Query-key pairs of their attention, see `prefill_pairs`."""
    num_decodes: int = 0
    """Sequences that get one more token."""
    num_context_tokens: int = 0
    """KV tokens those sequences read, summed."""


class StepTime(Protocol):
    """Seconds, never negative, monotone in every term, and linear in `num_context_tokens` while the
    rest is fixed: the sum over k decode steps then has a closed form."""

    def step_s(self, work: StepWork) -> float:
        """From a step's launch to its tokens, on all stages of one worker (a sequence's own latency)."""

    def cadence_s(self, work: StepWork) -> float:
        """Until the next, independent step can start: the slowest pipeline stage. Equal to `step_s`
        without pipeline parallelism."""


def prefill_pairs(num_new_tokens: int, num_context_tokens: int = 0) -> float:
    """Query-key pairs when `num_new_tokens` follow `num_context_tokens` that have their KV already."""
    return num_new_tokens * (num_context_tokens + (num_new_tokens + 1) / 2)
