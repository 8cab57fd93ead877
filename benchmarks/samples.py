"""From repeats to one figure: medians, ranges and paired ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some repeats and the range they covered. No confidence is claimed by it."""

    median: float
    low: float
    high: float
    num_repeats: int


def spread(values: Sequence[float]) -> Spread:
    if not values:
        raise ValueError("a spread needs at least one value")
    return Spread(median(values), min(values), max(values), len(values))


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Repeat i of one side over repeat i of the other: they ran one after the other, so what
    disturbed the machine slowly disturbed both."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} repeats beside {len(theirs)}")
    return [a / b if b else float("inf") if a else 1.0 for a, b in zip(ours, theirs, strict=True)]


def per_token(long_run: float, short_run: float, num_long: int, num_short: int) -> float:
    """What one more token costs, from the costs of a request with many and one with few."""
    if num_long <= num_short:
        raise ValueError(f"{num_long} tokens beside {num_short}: no difference to divide by")
    return (long_run - short_run) / (num_long - num_short)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank, as the load generator counts it."""
    ordered = sorted(values)
    return ordered[int((len(ordered) - 1) * share + 0.5)]
