"""Measured steps to the fits of a profile. Imports numpy; reading a profile does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from baton.step_time.base import StepTime
from baton.step_time.fit import Observation, every_third, fit_linear, fit_scales, residuals
from baton.step_time.gpus import gpu_by_name
from baton.step_time.least_squares import non_negative_least_squares
from baton.step_time.linear import LinearStepTime
from baton.step_time.phased import PhasedStepTime
from baton.step_time.profile import (
    Fits,
    HeldOut,
    LinearFit,
    LinkFit,
    MeasuredStep,
    MeasuredTransfer,
)
from baton.step_time.roofline import Scales, roofline
from baton.step_time.shapes import ModelShape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    fits: Fits
    held_out: HeldOut
    held_out_errors: list[tuple[MeasuredStep, float]]
    """Every step, with the relative error of the fit that was not shown it."""


def fit_steps(
    steps: Sequence[MeasuredStep], *, shape: ModelShape, tp: int, pp: int, gpu: str | None
) -> Fitted:
    """With a GPU's name its roofline is scaled, otherwise each phase gets a linear fit. Each third of the
    steps is predicted by a fit to the other two; the fit that is kept has seen all.

    Raises ValueError when a phase has fewer than three steps, or the GPU or split is unknown.
    """
    phases = [[s for s in steps if not s.num_decodes], [s for s in steps if s.num_decodes]]
    for name, members in zip(("prefill", "decode"), phases, strict=True):
        if len(members) < 3:
            raise ValueError(f"{len(members)} {name} steps were measured, a fit needs at least 3")
    errors: list[tuple[MeasuredStep, float]] = []
    for start in range(3):
        shown: list[MeasuredStep] = []
        hidden: list[MeasuredStep] = []
        for members in phases:
            out, kept = every_third(members, start)
            hidden += out
            shown += kept
        model = _model(_fits(shown, shape, tp, pp, gpu), shape, tp, pp)
        found = residuals(model, [_observation(step, tp) for step in hidden])
        errors += [(step, residual.relative_error) for step, residual in zip(hidden, found, strict=True)]
    sizes = [abs(error) for _, error in errors]
    return Fitted(
        fits=_fits(steps, shape, tp, pp, gpu),
        held_out=HeldOut(mean_error=sum(sizes) / len(sizes), worst_error=max(sizes), num_steps=len(sizes)),
        held_out_errors=errors,
    )


def fit_link(transfers: Sequence[MeasuredTransfer]) -> LinkFit | None:
    """None when nothing was moved, or size made no difference that could be seen."""
    if len(transfers) < 2:
        return None
    rows = np.array([[1.0, float(item.kv_bytes)] for item in transfers])
    seconds = np.array([max(item.seconds, 1e-6) for item in transfers])
    latency_s, per_byte_s = map(
        float, non_negative_least_squares(rows / seconds[:, None], np.ones(len(transfers)))
    )
    if per_byte_s <= 0:
        per_byte_s = float(seconds.min()) / max(item.kv_bytes for item in transfers) / 1e3
    return LinkFit(bytes_per_s=1 / per_byte_s, latency_s=latency_s)


def _fits(steps: Sequence[MeasuredStep], shape: ModelShape, tp: int, pp: int, gpu: str | None) -> Fits:
    observations = [_observation(step, tp) for step in steps]
    if gpu is not None:
        spec = gpu_by_name(gpu)
        scales = fit_scales(observations, lambda size, scales: roofline(spec, shape, size, pp, scales=scales))
        return Fits(gpu=spec.name, scales=dataclasses.asdict(scales))
    return Fits(
        prefill=_linear_fit(fit_linear([item for item in observations if not item.work.num_decodes])),
        decode=_linear_fit(fit_linear([item for item in observations if item.work.num_decodes])),
    )


def _model(fits: Fits, shape: ModelShape, tp: int, pp: int) -> StepTime:
    if fits.gpu is not None:
        return roofline(gpu_by_name(fits.gpu), shape, tp, pp, scales=Scales(**(fits.scales or {})))
    assert fits.prefill is not None and fits.decode is not None
    return PhasedStepTime(prefill=fits.prefill.step_time(pp), decode=fits.decode.step_time(pp))


FIELDS = ("base_s", "per_prefill_token_s", "per_prefill_pair_s", "per_decode_s", "per_context_token_s")


def _linear_fit(model: LinearStepTime) -> LinearFit:
    return LinearFit(**{name: getattr(model, name) for name in FIELDS})


def _observation(step: MeasuredStep, tp: int) -> Observation:
    return Observation(step.work, step.seconds, tp)
