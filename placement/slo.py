"""What is promised to a request, and which share of requests got it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from placement.requests import Requests, Trial
from placement.simulator import Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """A request counts when it meets both, each on its own time; an absent one is met by anybody."""

    ttft_s: float | None
    tpot_s: float | None
    attainment: float = 0.9
    """Share of requests that must."""

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name} is {value:g} s, expected more than 0")
        if self.ttft_s is None and self.tpot_s is None:
            raise ValueError("neither --ttft nor --tpot is given: without an SLO every placement is as good")
        if not 0 < self.attainment < 1:
            raise ValueError(f"--attainment is {self.attainment:g}, expected above 0 and below 1, like 0.9")

    @property
    def ttft_limit_s(self) -> float:
        return math.inf if self.ttft_s is None else self.ttft_s

    @property
    def tpot_limit_s(self) -> float:
        return math.inf if self.tpot_s is None else self.tpot_s

    def scaled(self, factor: float) -> Slo:
        return Slo(
            ttft_s=None if self.ttft_s is None else self.ttft_s * factor,
            tpot_s=None if self.tpot_s is None else self.tpot_s * factor,
            attainment=self.attainment,
        )

    def __str__(self) -> str:
        parts = [f"TTFT {self.ttft_s:g} s"] if self.ttft_s is not None else []
        parts += [f"TPOT {self.tpot_s:g} s"] if self.tpot_s is not None else []
        return f"{' and '.join(parts)} for {self.attainment:.0%} of requests"


@dataclass(frozen=True, slots=True)
class Attainment:
    both: float
    ttft: float
    tpot: float


def trial_at(requests: Requests, slo: Slo, rate_per_s: float) -> Trial:
    """Enough requests for this rate: at most as many are under way as arrive while one that just keeps
    the TPOT is decoded."""
    if slo.tpot_s is None:
        return requests.for_trial(0.0)
    return requests.for_trial(rate_per_s * slo.tpot_s * requests.mean_output_tokens)


def attained(timings: Timings, counted: slice, slo: Slo) -> Attainment:
    """`both` is joint, per request; the other two are for reading."""
    in_ttft = timings.ttft_s[counted] <= slo.ttft_limit_s
    in_tpot = timings.tpot_s[counted] <= slo.tpot_limit_s
    if math.isinf(slo.ttft_limit_s):
        in_ttft = np.isfinite(timings.ttft_s[counted])
    return Attainment(
        both=float(np.mean(in_ttft & in_tpot)), ttft=float(np.mean(in_ttft)), tpot=float(np.mean(in_tpot))
    )
