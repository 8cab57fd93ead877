"""Distributions of prompt, output and turn lengths, as a user can write them down.

    fixed:512   uniform:16,1024   exponential:300   lognormal:800,1.5   pareto:200,1.6
    bimodal:128,4000,0.1

Every sample is an integer of at least 1; `max=N` at the end of any of them cuts longer ones to N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from baton.workload.trace import Floats, Ints, WorkloadError


@dataclass(frozen=True, slots=True)
class Lengths:
    """A named distribution of token counts."""

    text: str
    """As it was written."""
    draw: Callable[[np.random.Generator, int], Floats]
    max_tokens: int | None = None

    def sample(self, rng: np.random.Generator, count: int) -> Ints:
        drawn = np.maximum(1, np.rint(self.draw(rng, count)))
        if self.max_tokens is not None:
            drawn = np.minimum(drawn, self.max_tokens)
        return np.asarray(drawn, np.int64)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class _Form:
    parameters: tuple[str, ...]
    build: Callable[..., Callable[[np.random.Generator, int], Floats]]


def _bimodal(short: float, long: float, share_long: float) -> Callable[[np.random.Generator, int], Floats]:
    """Two bumps of 20 % width: `share_long` of the samples lie around `long`."""
    if not 0 <= share_long <= 1:
        raise WorkloadError(f"a share of {share_long:g}, expected 0 to 1")

    def draw(rng: np.random.Generator, count: int) -> Floats:
        centre = np.where(rng.random(count) < share_long, long, short)
        return centre * rng.lognormal(0.0, 0.2, count)

    return draw


def _lognormal(mean: float, cv: float) -> Callable[[np.random.Generator, int], Floats]:
    sigma = math.sqrt(math.log(1 + cv**2))
    return lambda rng, count: rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)


def _pareto(smallest: float, exponent: float) -> Callable[[np.random.Generator, int], Floats]:
    """The heavy tail: P(X > x) = (smallest / x) ** exponent; no mean at 1 and below."""
    return lambda rng, count: smallest * (1 + rng.pareto(exponent, count))


FORMS = {
    "fixed": _Form(("tokens",), lambda tokens: lambda rng, count: np.full(count, tokens)),
    "uniform": _Form(
        ("low", "high"),
        lambda low, high: lambda rng, count: rng.integers(int(low), int(high) + 1, count).astype(np.float64),
    ),
    "exponential": _Form(("mean",), lambda mean: lambda rng, count: rng.exponential(mean, count)),
    "lognormal": _Form(("mean", "cv"), _lognormal),
    "pareto": _Form(("smallest", "exponent"), _pareto),
    "bimodal": _Form(("short", "long", "share_long"), _bimodal),
}


def parse_lengths(text: str) -> Lengths:
    """`fixed:512`, `lognormal:800,1.5,max=8192` … A bare number is fixed."""
    name, _, rest = text.partition(":") if ":" in text else ("fixed", "", text)
    form = FORMS.get(name)
    if form is None:
        raise WorkloadError(f"lengths {text!r}: unknown form {name!r}, expected one of {', '.join(FORMS)}")
    parts = rest.split(",")
    limit = parts.pop().partition("=")[2] if parts[-1].startswith("max=") else None
    if len(parts) != len(form.parameters):
        raise WorkloadError(f"lengths {text!r}: expected {name}:{','.join(form.parameters)}[,max=N]")
    numbers = [_positive(part, text, may_be_zero=name == "bimodal") for part in parts]
    if name == "uniform" and numbers[0] > numbers[1]:
        raise WorkloadError(f"lengths {text!r}: low is above high")
    max_tokens = None if limit is None else int(_positive(limit, text))
    return Lengths(text, form.build(*numbers), max_tokens)


def _positive(part: str, text: str, *, may_be_zero: bool = False) -> float:
    try:
        value = float(part)
    except ValueError:
        raise WorkloadError(f"lengths {text!r}: {part!r} is not a number") from None
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        raise WorkloadError(f"lengths {text!r}: {part} is out of range, expected more than 0")
    return value
