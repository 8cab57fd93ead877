"""What a simulated worker computes, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.contract.messages import KvEvent
from baton.simulation.kv_cache import Run
from baton.step_time import StepWork


class Leg:
    """One leg on one worker. Made by `SimulatedWorker.add_prefill` and `add_decode`."""

    __slots__ = (
        "added_s", "first_step_s", "hashes", "is_decoding", "is_kv_here", "is_kv_on_its_way", "is_prefill",
        "is_streamed", "keeps_kv", "leg_id", "namespace", "num_blocks", "num_cached_tokens",
        "num_kv_tokens", "num_named", "num_output_tokens", "num_outputs_done", "num_own_blocks",
        "num_prompt_tokens", "num_swapped_tokens", "packed", "runs",
    )  # fmt: skip

    def __init__(
        self,
        leg_id: str,
        num_prompt_tokens: int,
        num_output_tokens: int,
        hashes: Sequence[int],
        packed: bytes,
        namespace: str,
        added_s: float,
    ) -> None:
        self.leg_id = leg_id
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = num_output_tokens
        self.hashes = hashes
        self.packed = packed
        self.namespace = namespace
        self.added_s = added_s
        self.first_step_s: float | None = None
        self.is_prefill = False
        self.keeps_kv = False
        self.is_kv_on_its_way = False
        """Its KV comes from another worker and is not here yet."""
        self.is_streamed = False
        """Its KV comes while it is computed: its blocks are promised, and empty for long."""
        self.is_kv_here = False
        """Its KV came, but has no blocks yet."""
        self.is_decoding = False
        """Its next step computes one token and samples one."""
        self.num_outputs_done = 0
        self.num_kv_tokens = 0
        """Tokens whose KV is here."""
        self.num_swapped_tokens = 0
        """In host memory, of a leg that lost its blocks."""
        self.num_cached_tokens: int | None = None
        """Of the prompt, found here when the leg was first admitted."""
        self.num_blocks = 0
        """That its tokens fill; `runs` may reach further."""
        self.num_own_blocks = 0
        """Of those, not in `runs`: no hash names them."""
        self.runs: list[Run] = []
        self.num_named = 0
        """Hashes of the prompt whose blocks are in `runs`, complete."""

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_outputs_done

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_prompt_tokens + self.num_outputs_done - self.num_kv_tokens

    @property
    def num_outputs_left(self) -> int:
        return self.num_output_tokens - self.num_outputs_done


class PlannedStep(NamedTuple):
    """One step, or several equal ones in a row: the same legs decode, and nothing else happens."""

    work: StepWork
    """Of the first."""
    num_steps: int
    start_s: float
    end_s: float
    """Of the last."""
    first_s: float
    """How long the first takes."""

    @property
    def _more_s(self) -> float:
        """By which each takes longer than the one before: always the same."""
        num_steps = self.num_steps
        if num_steps == 1:
            return 0.0
        return 2 * ((self.end_s - self.start_s) / num_steps - self.first_s) / (num_steps - 1)

    def step_end_s(self, number: int) -> float:
        """When the so-manyth step ends, from 1."""
        return self.start_s + number * (self.first_s + self._more_s * (number - 1) / 2)

    def num_ended(self, now_s: float) -> int:
        """Steps that end at `now_s` or before."""
        elapsed_s, half_more_s = now_s - self.start_s, self._more_s / 2
        # Of the root's two forms the one that also holds where `half_more_s` is 0.
        linear_s = self.first_s - half_more_s
        root = linear_s + math.sqrt(max(0.0, linear_s**2 + 4 * half_more_s * elapsed_s))
        return min(self.num_steps, int(2 * elapsed_s / root)) if root > 0.0 else self.num_steps


class Fetch(NamedTuple):
    """A decode leg has its blocks; its KV may come now."""

    leg_id: str
    num_tokens: int
    """Of the prompt, that this worker does not hold already; or all that were swapped out."""
    is_swap: bool
    """From this worker's host memory, not from another worker."""


@dataclass(slots=True)
class FinishedLeg:
    leg_id: str
    num_cached_tokens: int
    """Of its prompt, found in this worker's own cache."""
    first_step_s: float
    """When its first step began; before that it was queued."""
    num_held_blocks: int = 0
    """Of a prefill leg that keeps its KV, until `Places.release`."""


@dataclass(slots=True)
class StepResult:
    num_steps: int
    end_s: float
    first_end_s: float
    """Of the first of these steps."""
    first_tokens: list[str] = field(default_factory=list)
    """Legs but prefill legs whose first token came, in the first of these steps."""
    tokens: list[tuple[str, int]] = field(default_factory=list)
    """New tokens by leg, in batch order."""
    finished_prefills: list[FinishedLeg] = field(default_factory=list)
    """Their one token is not among `tokens`."""
    finished: list[FinishedLeg] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    """Lost their blocks while the step was planned; they wait, and compute everything again."""
    events: tuple[KvEvent, ...] = ()
    num_prefill_tokens: int = 0
    """Prompt tokens computed in it."""
