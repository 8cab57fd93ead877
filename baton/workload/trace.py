"""A trace: requests in the order of their arrival, held as columns.

Prefix identity is a list of *block hashes* per request. A hash names `block_size_tokens` tokens and
everything before them, so two prompts share cached KV exactly as far as their leading hashes agree.
The last hash may stand for a partly filled block (Mooncake's files do that); `num_full_blocks` tells
how many of them can be hits.

Sessions (conversations) have an id, and each of their requests a think time: with both a trace can be
replayed closed loop, where a turn arrives `think_s` after the answer of the turn before it ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_SESSION = -1
_NO_HASHES: Ints = np.zeros(0, np.int64)


class WorkloadError(ValueError):
    """A trace or a description of a workload cannot be used; the message says where and why."""


class TraceRequest(NamedTuple):
    """One request of a trace."""

    position: int
    """Which one it is in its trace, from 0."""
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_hashes: Ints
    """Empty where the trace knows nothing of prefixes."""
    session_id: int
    """`NO_SESSION` for a request of its own."""
    turn: int
    """0 for the first request of its session."""
    think_s: float
    """Seconds between the end of the session's turn before and this arrival; 0 for a first turn."""


@dataclass(frozen=True, slots=False, kw_only=True, eq=False)
class Trace:
    """Columns of equal length, sorted by `arrival_s`. Arrays are not to be written to."""

    name: str
    arrival_s: Floats
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    block_size_tokens: int = 0
    """Tokens one block hash stands for; 0: no hashes."""
    block_hashes: Sequence[Ints] = ()
    """One array per request, or none at all."""
    session_ids: Ints = field(default_factory=lambda: _NO_HASHES)
    """One per request, or none at all. The same for `turns` and `think_s`."""
    turns: Ints = field(default_factory=lambda: _NO_HASHES)
    think_s: Floats = field(default_factory=lambda: np.zeros(0))
    has_arrivals: bool = True
    """False: the file had lengths only, every arrival is 0 until `retimed` gives it a time."""

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        if count == 0:
            raise WorkloadError(f"{self.name} has no requests")
        for column in (self.num_prompt_tokens, self.num_output_tokens):
            assert len(column) == count
        for optional in (self.block_hashes, self.session_ids, self.turns, self.think_s):
            assert len(optional) in (0, count)
        assert len(self.turns) == len(self.think_s) == len(self.session_ids)
        assert not len(self.block_hashes) or self.block_size_tokens > 0
        if count > 1 and np.any(np.diff(self.arrival_s) < 0):
            raise WorkloadError(f"{self.name}: arrivals are not in order")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __getitem__(self, index: int) -> TraceRequest:
        has_session = len(self.session_ids) > 0
        return TraceRequest(
            index,
            float(self.arrival_s[index]),
            int(self.num_prompt_tokens[index]),
            int(self.num_output_tokens[index]),
            self.block_hashes[index] if len(self.block_hashes) else _NO_HASHES,
            int(self.session_ids[index]) if has_session else NO_SESSION,
            int(self.turns[index]) if has_session else 0,
            float(self.think_s[index]) if has_session else 0.0,
        )

    def __iter__(self) -> Iterator[TraceRequest]:
        return (self[index] for index in range(len(self)))

    @property
    def duration_s(self) -> float:
        """From time 0 to the last arrival."""
        return float(self.arrival_s[-1])

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals per second, from the first arrival to the last."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0 else 0.0

    @property
    def gap_cv(self) -> float:
        """Standard deviation over mean of the times between arrivals; 1 for a Poisson process."""
        gaps = np.diff(self.arrival_s)
        return float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else 0.0

    def num_full_blocks(self, index: int) -> int:
        """How many of the request's hashes stand for a full block."""
        if not len(self.block_hashes):
            return 0
        full = int(self.num_prompt_tokens[index]) // self.block_size_tokens
        return min(full, len(self.block_hashes[index]))

    @cached_property
    def previous_turn(self) -> Ints:
        """For each request the position of the turn before it in its session; -1 where there is none."""
        previous = np.full(len(self), -1, np.int64)
        last: dict[int, int] = {}
        for index, session in enumerate(self.session_ids.tolist()):
            if session != NO_SESSION:
                previous[index] = last.get(session, -1)
                last[session] = index
        return previous

    def ideal_hit_share(self) -> float:
        """Share of prompt tokens found in one unbounded cache that holds every prompt from its arrival
        on; the ceiling for any routing."""
        if not len(self.block_hashes):
            return 0.0
        seen: set[int] = set()
        num_hit_tokens = 0
        for index, hashes in enumerate(self.block_hashes):
            leading = hashes[: self.num_full_blocks(index)].tolist()
            num_hits = next((n for n, block in enumerate(leading) if block not in seen), len(leading))
            num_hit_tokens += num_hits * self.block_size_tokens
            seen.update(leading)
        return num_hit_tokens / int(self.num_prompt_tokens.sum())

    def take(self, indices: Ints | slice | Sequence[int]) -> Trace:
        """Only these requests, in the order of their arrival; times stay as they are. Turns whose
        earlier turns are left out become the first of their session."""
        chosen = np.arange(len(self))[indices]
        if len(chosen) == 0:
            raise WorkloadError(f"nothing is left of the {len(self)} requests of {self.name}")
        chosen = chosen[np.argsort(self.arrival_s[chosen], kind="stable")]
        has_session = len(self.session_ids) > 0
        return replace(
            self,
            arrival_s=self.arrival_s[chosen],
            num_prompt_tokens=self.num_prompt_tokens[chosen],
            num_output_tokens=self.num_output_tokens[chosen],
            block_hashes=[self.block_hashes[index] for index in chosen] if len(self.block_hashes) else (),
            session_ids=self.session_ids[chosen] if has_session else self.session_ids,
            turns=self.turns[chosen] if has_session else self.turns,
            think_s=self.think_s[chosen] if has_session else self.think_s,
        )

    def first(self, num_requests: int) -> Trace:
        return self.take(slice(0, num_requests))

    def between(self, start_s: float, end_s: float) -> Trace:
        """Arrivals in [start_s, end_s), with time 0 at `start_s`."""
        part = self.take(np.flatnonzero((self.arrival_s >= start_s) & (self.arrival_s < end_s)))
        return replace(part, arrival_s=part.arrival_s - start_s)

    def at_most(self, max_model_len: int) -> Trace:
        """Without the requests whose prompt and output do not fit into so many tokens."""
        fits = self.num_prompt_tokens + self.num_output_tokens <= max_model_len
        if not fits.any():
            shortest = int((self.num_prompt_tokens + self.num_output_tokens).min())
            raise WorkloadError(
                f"no request of {self.name} fits into {max_model_len} tokens, the shortest has {shortest}"
            )
        return self.take(np.flatnonzero(fits))


def trace_of(requests: Iterable[TraceRequest], *, name: str, block_size_tokens: int = 0) -> Trace:
    """A trace of requests in any order; their `position` is given anew. Requests that arrive together keep
    their order."""
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    has_sessions = any(request.session_id != NO_SESSION for request in ordered)
    return Trace(
        name=name,
        arrival_s=np.array([request.arrival_s for request in ordered], np.float64),
        num_prompt_tokens=np.array([request.num_prompt_tokens for request in ordered], np.int64),
        num_output_tokens=np.array([request.num_output_tokens for request in ordered], np.int64),
        block_size_tokens=block_size_tokens,
        block_hashes=[request.block_hashes for request in ordered] if block_size_tokens else (),
        session_ids=np.array([request.session_id for request in ordered] if has_sessions else [], np.int64),
        turns=np.array([request.turn for request in ordered] if has_sessions else [], np.int64),
        think_s=np.array([request.think_s for request in ordered] if has_sessions else [], np.float64),
    )
