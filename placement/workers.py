"""What one worker of a split can do: its step times as a table, and the KV tokens it holds.

A *source* says so for a model on a GPU: the roofline of `baton.step_time`, published constants, or a
profile that was measured. The planner asks nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from baton.step_time import StepTime, prefill_pairs
from placement.cluster import Split
from placement.step_table import MixedTable, StepTable, tabulate, tabulate_mixed

MAX_BATCH = 256
"""Sequences in one decode step."""
MAX_PREFILL_BATCH_TOKENS = 8192
MIN_PREFILL_BATCH_TOKENS = 512
SATURATED = 1.1
"""A prefill batch is long enough when a token costs at most so much more than in a very long one."""


class Source(Protocol):
    """Answers for one model on one kind of GPU."""

    @property
    def name(self) -> str: ...

    @property
    def kv_bytes_per_token(self) -> float: ...

    @property
    def error_band(self) -> float | None:
        """Relative error that nine of ten step times keep; None: unknown."""

    def step_time(self, split: Split) -> StepTime | None:
        """None: this source knows nothing of that split."""

    def kv_tokens(self, split: Split) -> int:
        """Of one worker; 0 when the weights do not fit."""


@dataclass(frozen=True, slots=True, eq=False)
class WorkerKind:
    split: Split
    table: StepTable
    kv_tokens: int
    batch_tokens: int
    """Where batching more prompts stops to pay."""
    step_time: StepTime

    @property
    def num_gpus(self) -> int:
        return self.split.num_gpus

    def mixed(self, budget_tokens: int) -> MixedTable:
        stages = self.table.num_stages
        return tabulate_mixed(
            self.step_time, num_stages=stages, max_batch=self.table.max_batch, budget_tokens=budget_tokens
        )


def worker_kind(
    source: Source, split: Split, *, max_prompt_tokens: int, max_batch: int = MAX_BATCH
) -> WorkerKind | None:
    """None: the model does not fit, or the source does not know the split."""
    kv_tokens = source.kv_tokens(split)
    step_time = source.step_time(split) if kv_tokens > 0 else None
    if step_time is None:
        return None
    table = tabulate(
        step_time, num_stages=split.pipeline, max_batch=max_batch,
        max_tokens=max(max_prompt_tokens, MAX_PREFILL_BATCH_TOKENS),
    )  # fmt: skip
    return WorkerKind(split, table, kv_tokens, saturation_tokens(table), step_time)


def saturation_tokens(table: StepTable, prompt_tokens: int = 512) -> int:
    """DistServe's L_m: the smallest batch of prompts whose tokens cost no more than `SATURATED` times what
    they cost in the longest one."""
    tokens = table.prefill[0]
    tokens = tokens[tokens <= MAX_PREFILL_BATCH_TOKENS]
    pairs = tokens / prompt_tokens * prefill_pairs(prompt_tokens)
    per_token = (table.prefill[3, : len(tokens)] + table.prefill[4, : len(tokens)] * pairs) / tokens
    enough = tokens[np.flatnonzero(per_token <= SATURATED * per_token[-1])[0]]
    return int(max(enough, MIN_PREFILL_BATCH_TOKENS))


def all_splits(
    max_tensor: int, max_gpus: int, *, tensor_sizes: Sequence[int] | None = None, max_pipeline: int = 4
) -> list[Split]:
    """Powers of two for TP unless sizes are given: kernels and vocabularies are made for those."""
    sizes = tensor_sizes or [2**k for k in range(max_tensor.bit_length()) if 2**k <= max_tensor]
    return [
        Split(tensor, pipeline)
        for tensor in sizes
        if tensor <= max_tensor
        for pipeline in range(1, max_pipeline + 1)
        if tensor * pipeline <= max_gpus
    ]
