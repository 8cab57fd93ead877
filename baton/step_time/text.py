"""A step-time model as a user writes it down: `MODEL@GPU`, `MODEL@GPUxTP`, `linear:NAME=SECONDS,…`, or a
profile's file, `NAME.json`."""

from __future__ import annotations

import dataclasses

from baton.step_time.base import StepTime
from baton.step_time.linear import LinearStepTime
from baton.step_time.profile import load_profile
from baton.step_time.roofline import by_name
from baton.step_time.shapes import shape_by_name


def parse_step_time(text: str) -> StepTime:
    """Raises ValueError with a sentence."""
    if text.startswith("linear:"):
        return _linear(text.removeprefix("linear:"))
    if text.endswith(".json"):
        return load_profile(text).step_time()
    model, _, gpu = text.rpartition("@")
    if not model:
        raise ValueError(f"{text!r}, expected MODEL@GPU, MODEL@GPUxTP, linear:NAME=SECONDS,… or PROFILE.json")
    name, _, ranks = gpu.rpartition("x")
    if name and ranks.isdigit():
        return by_name(name, shape_by_name(model), int(ranks))
    return by_name(gpu, shape_by_name(model))


def _linear(text: str) -> LinearStepTime:
    known = {field.name for field in dataclasses.fields(LinearStepTime)}
    values: dict[str, float] = {"base_s": 0.0}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in known:
            raise ValueError(f"{name!r} is no part of a linear step time, known: {', '.join(sorted(known))}")
        try:
            values[name] = int(number) if name == "num_stages" else float(number)
        except ValueError:
            raise ValueError(f"{name} is {number!r}, expected a number") from None
    return LinearStepTime(**values)  # type: ignore[arg-type]
