"""Which steps are measured: few points, spread evenly in the logarithm, cheap ones first."""

from __future__ import annotations

from dataclasses import dataclass

from baton.contract.messages import WorkerCapacity

NUM_STEPS = 16
"""Decode steps per visit of a point; the median of their gaps counts."""

HEADROOM_TOKENS = 192
"""Beside a decode point's context: early sequences generate while the last ones' prompts are computed."""

MAX_PROMPT_TOKENS = 8_192
"""Longest prompt measured; longer ones are computed in chunks on most engines."""

DEFAULT_STEP_TOKENS = {"cpu": 2_048, "cuda": 8_192}
"""Prompt tokens that surely fit into one step where the engine was not told a number."""


@dataclass(frozen=True, slots=True)
class Grid:
    prompts: tuple[int, ...]
    """Tokens."""
    decodes: tuple[tuple[int, int], ...]
    """(batch, tokens of context each)."""
    transfers: tuple[int, ...]
    """Prompt tokens whose KV is moved."""


def grid(capacity: WorkerCapacity, *, block_size_tokens: int, max_step_tokens: int) -> Grid:
    """Raises ValueError when the engine is too small to be measured."""
    longest = min(capacity.max_model_len - HEADROOM_TOKENS - 1, max_step_tokens, MAX_PROMPT_TOKENS)
    if longest < 64:
        raise ValueError(
            f"the engine takes {capacity.max_model_len} tokens a sequence and {max_step_tokens} a step; "
            f"measuring needs prompts of 64 and {HEADROOM_TOKENS} tokens more"
        )
    prompts = _spread(32, longest, 8)
    contexts = _spread(64, longest, 3)
    batches = [batch for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256) if batch <= capacity.max_batch_size]
    batches = _thinned(batches, 5)
    kv_tokens = capacity.num_blocks * block_size_tokens
    decodes = [
        (batch, context)
        for context in contexts
        for batch in batches
        if batch * (context + HEADROOM_TOKENS) <= 0.9 * kv_tokens
    ]
    decodes.sort(key=lambda point: point[0] * point[1])
    return Grid(tuple(prompts), tuple(decodes), tuple(_spread(64, longest, 4)))


def _spread(low: int, high: int, count: int) -> list[int]:
    ratio = (high / low) ** (1 / (count - 1))
    return sorted({min(high, round(low * ratio**index)) for index in range(count)})


def _thinned(values: list[int], count: int) -> list[int]:
    if len(values) <= count:
        return values
    return sorted({values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)})
