"""What a policy sees, what it answers, and how the answer becomes a choice.

A policy ranks: it returns one or more vectors over the candidates, smallest best, the second one
deciding ties of the first, and so on. What is still tied is drawn, from a number that comes with
the decision: the paper's own code takes the lowest index, which turns every exact tie (an idle
fleet, a prompt everybody holds) into a hotspot on worker 0. The draw is part of the facts, so a
recorded decision can be made again.

Candidates hand out facts by name and remember which were read: an explanation is exactly these,
for all workers, and a replay is the same policy on the same facts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from baton.policy.ledger import Ledger, Vector, WorkerAccount

Key = npt.NDArray[Any]
"""One number per candidate, smallest best: integers, floats or booleans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What a policy may know of a request before it runs."""

    num_prompt_tokens: int
    num_expected_output_tokens: int


class Candidates:
    """The workers that may take a request now, with aligned facts about them."""

    __slots__ = ("_read", "draw", "facts", "ledger", "now_s", "slots")

    def __init__(
        self,
        facts: RequestFacts,
        ledger: Ledger | None,
        slots: Vector,
        *,
        hit_tokens: Vector | None = None,
        draw: int = 0,
        now_s: float = 0.0,
    ) -> None:
        """`hit_tokens` is aligned with `slots`: predicted hits in full blocks, capped at prompt - 1
        by whoever matched them (the engine always computes at least one token)."""
        self.facts = facts
        self.ledger = ledger
        """None in a replay: everything a policy reads was recorded."""
        self.slots = slots
        self.draw = draw
        self.now_s = now_s
        self._read: dict[str, Key] = {}
        if hit_tokens is not None:
            self._read["hit_tokens"] = hit_tokens

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def read(self) -> dict[str, Key]:
        """Every fact that was read so far, by name."""
        return self._read

    def given(self, name: str, compute: Callable[[], Key]) -> Key:
        """A fact only one policy has (a window, say): computed now, or what was recorded."""
        values = self._read.get(name)
        if values is None:
            values = self._read[name] = compute()
        return values

    def _column(self, name: str) -> Key:
        values = self._read.get(name)
        if values is None:
            assert self.ledger is not None, f"{name} was not recorded"
            values = self._read[name] = self.ledger.gather(name, self.slots)
        return values

    @property
    def hit_tokens(self) -> Key:
        values = self._read.get("hit_tokens")
        if values is None:
            values = self._read["hit_tokens"] = np.zeros(len(self.slots), dtype=np.int64)
        return values

    @property
    def num_queued_tokens(self) -> Key:
        return self._column("num_queued_tokens")

    @property
    def num_legs(self) -> Key:
        """Running and queued, without this request."""
        return self._column("num_legs")

    @property
    def num_waiting(self) -> Key:
        return self._column("num_waiting")

    @property
    def num_running(self) -> Key:
        return self.num_legs - self.num_waiting

    @property
    def num_kv_tokens(self) -> Key:
        return self._column("num_kv_tokens")

    @property
    def block_size_tokens(self) -> Key:
        return self._column("block_size_tokens")

    @property
    def last_turn(self) -> Key:
        return self._column("last_turn")

    @property
    def p_tokens(self) -> Key:
        """P-token: uncached tokens queued there + uncached tokens of this prompt."""
        uncached: Key = self.facts.num_prompt_tokens - self.hit_tokens
        return self.num_queued_tokens + uncached

    @property
    def batch(self) -> Key:
        """Batch size with this request in it: never 0, so an idle worker's hits still count."""
        return self.num_legs + 1


class Policy(Protocol):
    """Ranks candidates. One small class per policy, each in its own file."""

    @property
    def name(self) -> str:
        """As `registry.by_name` takes it, parameters included."""

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        """Vectors over the candidates, smallest best, later ones for ties. No side effects.
        Empty: all are equal."""

    def committed(self, candidates: Candidates, position: int) -> None:
        """The request went to this candidate. Only policies with a memory do anything here."""


@runtime_checkable
class RanksOne(Protocol):
    """A policy without memory that can also rank a worker by itself: for a few workers plain numbers
    cost a fraction of vectors. The order must be the one of `rank`."""

    def rank_one(self, account: WorkerAccount, num_uncached_tokens: int) -> tuple[int, ...]:
        """Smallest best, later numbers for ties. The second argument is of this prompt."""


class Memoryless:
    """For policies that remember nothing between decisions."""

    __slots__ = ()

    def committed(self, candidates: Candidates, position: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision: who, and everything it was made of."""

    policy: str
    candidates: Candidates
    keys: tuple[Key, ...]
    position: int
    """Of the chosen one among the candidates."""
    num_tied: int
    """How many were equal in all keys; more than one: the draw decided."""

    @property
    def slot(self) -> int:
        return int(self.candidates.slots[self.position])

    @property
    def account(self) -> WorkerAccount:
        assert self.candidates.ledger is not None
        return self.candidates.ledger.account(self.slot)

    @property
    def hit_tokens(self) -> int:
        return int(self.candidates.hit_tokens[self.position])


def choose(policy: Policy, candidates: Candidates) -> Choice | None:
    """None: no candidates. With one candidate nothing is ranked."""
    num_candidates = len(candidates.slots)
    if num_candidates <= 1:
        return Choice(policy.name, candidates, (), 0, 1) if num_candidates else None
    keys = policy.rank(candidates)
    best: npt.NDArray[Any] | None = None
    for key in keys:
        if best is None:
            (best,) = (key == key.min()).nonzero()
        else:
            values = key[best]
            best = best[values == values.min()]
        if len(best) == 1:
            return Choice(policy.name, candidates, keys, int(best[0]), 1)
    if best is None:
        return Choice(policy.name, candidates, keys, candidates.draw % num_candidates, num_candidates)
    return Choice(policy.name, candidates, keys, int(best[candidates.draw % len(best)]), len(best))
