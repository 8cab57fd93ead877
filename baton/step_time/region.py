"""Where a step-time model was checked. Outside of that it still answers; whoever shows the answer
asks here whether to say so."""

from __future__ import annotations

from dataclasses import dataclass

from baton.step_time.base import StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    min_prefill_tokens: int = 1
    max_prefill_tokens: int
    """Of one step."""
    max_decodes: int
    max_context_tokens: int
    """Of one decoding sequence, on average over the step."""
    notes: tuple[str, ...] = ()
    """Sentences that hold for every step: settings of the model that nobody measured."""

    def outside(self, work: StepWork) -> list[str]:
        """One sentence per way in which this step lies outside; empty inside."""
        found = list(self.notes)
        tokens = work.num_prefill_tokens
        if tokens > self.max_prefill_tokens:
            found.append(f"{tokens:,} prompt tokens in a step, checked up to {self.max_prefill_tokens:,}")
        if 0 < tokens < self.min_prefill_tokens and not work.num_decodes:
            found.append(f"{tokens:,} prompt tokens in a step, checked from {self.min_prefill_tokens:,}")
        if work.num_decodes > self.max_decodes:
            found.append(
                f"{work.num_decodes:,} sequences decode together, checked up to {self.max_decodes:,}"
            )
        if work.num_context_tokens > self.max_context_tokens * work.num_decodes:
            average = work.num_context_tokens / max(1, work.num_decodes)
            found.append(f"{average:,.0f} tokens of context, checked up to {self.max_context_tokens:,}")
        return found
