"""From measured steps to a model, in relative error: 1 ms too much on a 5 ms step counts as 20 ms on
a 100 ms step. numpy is imported here and not by the models themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from baton.step_time.base import StepTime, StepWork
from baton.step_time.least_squares import Array, non_negative_least_squares
from baton.step_time.linear import LinearStepTime
from baton.step_time.roofline import Parts, RooflineStepTime, Scales

PRIOR_WEIGHT = 0.2
"""How much "this scale is 1" counts beside one measurement: the physical form errs by about 4 %, shipped
scales by about 20 %. A scale that no measurement speaks about stays at 1."""

GROUPS = Parts._fields
MIN_SCALE = 1e-3
ROUNDS = 30


class Observation(NamedTuple):
    work: StepWork
    seconds: float
    tensor_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class Residual:
    work: StepWork
    measured_s: float
    predicted_s: float

    @property
    def relative_error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def residuals(model: StepTime, observations: Sequence[Observation]) -> list[Residual]:
    return [Residual(item.work, item.seconds, model.step_s(item.work)) for item in observations]


def mean_absolute_error(found: Sequence[Residual]) -> float:
    """Relative (MAPE as a share). Raises ValueError without residuals."""
    if not found:
        raise ValueError("no measured steps to compare with")
    return sum(abs(residual.relative_error) for residual in found) / len(found)


def fit_linear(observations: Sequence[Observation], *, num_stages: int = 1) -> LinearStepTime:
    """Five coefficients, none negative."""
    _check(observations)
    rows = [[1.0, *map(float, item.work)] for item in observations]
    matrix = np.array(rows) / np.array([[item.seconds] for item in observations])
    base_s, token_s, pair_s, decode_s, context_s = map(
        float, non_negative_least_squares(matrix, np.ones(len(observations)))
    )
    return LinearStepTime(
        base_s=base_s,
        per_prefill_token_s=token_s,
        per_prefill_pair_s=pair_s,
        per_decode_s=decode_s,
        per_context_token_s=context_s,
        num_stages=num_stages,
    )


def fit_scales(
    observations: Sequence[Observation], model_of: Callable[[int, Scales], RooflineStepTime]
) -> Scales:
    """The factors on a roofline's groups. `model_of(tensor_parallel_size, scales)` makes the model.

    Whether a matrix product computes or reads longer depends on the scales themselves, so the linear
    problem is solved for the present answer to that, a few times over; the best round is kept.
    """
    _check(observations)
    num_groups = len(GROUPS)
    sizes = sorted({item.tensor_parallel_size for item in observations})
    prior = PRIOR_WEIGHT * np.eye(num_groups)
    factors = np.ones(num_groups)
    best, best_error = factors, np.inf
    for _ in range(ROUNDS):
        scales = _scales(factors)
        models = {size: model_of(size, scales) for size in sizes}
        parts = np.array([models[item.tensor_parallel_size].parts(item.work) for item in observations])
        matrix = parts / factors / np.array([[item.seconds] for item in observations])
        error = float(((matrix @ factors - 1) ** 2).sum() + ((prior @ (factors - 1)) ** 2).sum())
        if error < best_error - 1e-12:
            best, best_error = factors, error
        target = np.concatenate([np.ones(len(observations)), prior @ np.ones(num_groups)])
        solved = non_negative_least_squares(np.vstack([matrix, prior]), target)
        factors = np.maximum(MIN_SCALE, (factors + solved) / 2)
    return _scales(best)


def _scales(factors: Array) -> Scales:
    return Scales(**dict(zip(GROUPS, map(float, factors), strict=True)))


T = TypeVar("T")


def every_third(items: Sequence[T], start: int = 0) -> tuple[list[T], list[T]]:
    """(every third one from `start`, the rest): in measuring order, so that both see every region."""
    chosen = [item for index, item in enumerate(items) if index % 3 == start]
    rest = [item for index, item in enumerate(items) if index % 3 != start]
    return chosen, rest


def _check(observations: Sequence[Observation]) -> None:
    if not observations:
        raise ValueError("no measured steps to fit")
    for item in observations:
        if not item.seconds > 0:
            raise ValueError(f"a measured step took {item.seconds:g} s, expected more than 0")
