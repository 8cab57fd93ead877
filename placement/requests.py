"""The requests that every candidate is tried with: the same lengths and the same gaps at every rate.

Common random numbers: a rate only stretches the arrivals, so two placements, or two rates, differ by
what they do and not by what they were given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MIN_REQUESTS = 10_000
"""With 300, as DistServe's simulator has them, goodput is about 30 % too high and uncertain by 10 %."""
WARM_UP_SHARE = 0.1
"""Of the requests, dropped: they met an empty fleet. More where more than that are under way at once."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Columns of equal length, in the order of arrival."""

    arrival: Floats
    """At a mean rate of one per second; divided by the rate of a trial."""
    num_prompt_tokens: Ints
    num_cached_tokens: Ints
    """Of the prompt, found in a prefix cache; at most prompt − 1."""
    num_output_tokens: Ints
    draw: Ints
    """Decides exact ties in dispatch."""
    name: str = "workload"
    per_trial: int = MIN_REQUESTS
    """A simulation takes so many of them, and more when many are under way at once."""

    def __post_init__(self) -> None:
        assert len(self.arrival) > 1

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def mean_output_tokens(self) -> float:
        return float(self.num_output_tokens.mean())

    @property
    def max_prompt_tokens(self) -> int:
        return int(self.num_prompt_tokens.max())

    def for_trial(self, num_under_way: float) -> Trial:
        """`num_under_way`: requests in the fleet at once. As many more requests are taken, so that neither
        the filling at the start nor the emptying at the end is counted."""
        count = min(len(self), int(self.per_trial + 2.5 * num_under_way))
        first = int(max(WARM_UP_SHARE * count, min(1.2 * num_under_way, 0.4 * count)))
        last = count - int(min(num_under_way, 0.3 * count))
        return Trial(self.first(count), first, last)

    def first(self, count: int) -> Requests:
        if count >= len(self):
            return self
        part = slice(0, count)
        return Requests(
            self.arrival[part], self.num_prompt_tokens[part], self.num_cached_tokens[part],
            self.num_output_tokens[part], self.draw[part], self.name, self.per_trial,
        )  # fmt: skip

    def only(self, mask: npt.NDArray[np.bool_]) -> Requests:
        return Requests(
            self.arrival[mask], self.num_prompt_tokens[mask], self.num_cached_tokens[mask],
            self.num_output_tokens[mask], self.draw[mask], self.name, self.per_trial,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trial:
    """Requests of one simulation, and which of them count."""

    requests: Requests
    first_counted: int
    end_counted: int

    @property
    def counted(self) -> slice:
        return slice(self.first_counted, self.end_counted)

    @property
    def num_counted(self) -> int:
        return self.end_counted - self.first_counted


def make_requests(
    num_prompt_tokens: Ints,
    num_output_tokens: Ints,
    *,
    gaps: Floats,
    num_cached_tokens: Ints | None = None,
    seed: int = 0,
    name: str = "workload",
    per_trial: int = MIN_REQUESTS,
) -> Requests:
    """`gaps` between arrivals in any unit; they are scaled to a mean of one second."""
    count = len(num_prompt_tokens)
    cached = np.zeros(count, np.int64) if num_cached_tokens is None else num_cached_tokens
    arrival = np.cumsum(gaps) * (count / gaps.sum())
    return Requests(
        arrival=arrival,
        num_prompt_tokens=np.ascontiguousarray(num_prompt_tokens, np.int64),
        num_cached_tokens=np.minimum(cached, num_prompt_tokens - 1).astype(np.int64),
        num_output_tokens=np.ascontiguousarray(num_output_tokens, np.int64),
        draw=np.random.default_rng([seed, 7]).integers(0, 2**48, count),
        name=name,
        per_trial=per_trial,
    )
