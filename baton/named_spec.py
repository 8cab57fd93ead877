"""`NAME` or `NAME:P1,P2`: how a flag names one of several policies, with parameters in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Maker = TypeVar("Maker")


def parse_named_spec(
    spec: str, makers: Mapping[str, tuple[Maker, Sequence[type]]], *, noun: str
) -> tuple[str, Maker, list[Any]]:
    """(name, its maker, the given parameters by type). Parameters may be left out from the end. Raises
    ValueError naming the `noun`, the parameter and what is allowed."""
    name, _, text = spec.partition(":")
    if name not in makers:
        raise ValueError(f"no {noun} is called {name!r}; there are {', '.join(makers)}")
    maker, types = makers[name]
    parameters = text.split(",") if text else []
    if len(parameters) > len(types):
        raise ValueError(f"{name} takes {len(types)} parameters, {spec!r} gives {len(parameters)}")
    values = []
    for kind, parameter in zip(types, parameters, strict=False):
        try:
            values.append(kind(parameter))
        except ValueError:
            raise ValueError(f"{spec!r}: {parameter!r} is no {kind.__name__}") from None
    return name, maker, values
