"""Traces as CSV: a header and one row a request. CSV rows know no prefixes."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeVar

import numpy as np

from baton.workload.trace import NO_SESSION, Ints, Trace, TraceRequest, WorkloadError, trace_of

_NO_HASHES: Ints = np.zeros(0, np.int64)
Row = dict[str, str]
_T = TypeVar("_T")


class _Bad(Exception):
    """What is wrong with one row; the reader adds where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputClasses:
    """Real output lengths beside the guesses of length predictors: higher class, longer output."""

    num_output_tokens: Ints
    predicted: dict[str, Ints]
    """By column name; one class per request."""


def read(lines: Iterable[str], path: str, name: str) -> Trace:
    """`path` is for messages; the header decides the format."""
    rows = csv.DictReader(lines)
    header = set(rows.fieldnames or ())
    has_arrivals = True
    parse: Callable[[Row], TraceRequest]
    if {"arrival_s", "num_prompt_tokens", "num_output_tokens"} <= header:
        parse = _plain(header)
    elif {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= header:
        parse = _azure
    elif {"input_length", "output_length"} <= header:
        has_arrivals = "timestamp_ms" in header
        parse = _timed_lengths if has_arrivals else _lengths
    else:
        raise WorkloadError(
            f"{path}, line 1: columns {', '.join(sorted(header))} belong to no known trace, expected "
            "arrival_s,num_prompt_tokens,num_output_tokens or TIMESTAMP,ContextTokens,GeneratedTokens or "
            "input_length,output_length"
        )
    requests = _parsed(rows, path, parse)
    start_s = min(request.arrival_s for request in requests) if parse is _azure else 0.0
    if start_s:
        requests = [request._replace(arrival_s=request.arrival_s - start_s) for request in requests]
    return replace(trace_of(requests, name=name), has_arrivals=has_arrivals)


def read_output_classes(lines: Iterable[str], path: str) -> OutputClasses:
    rows = csv.DictReader(lines)
    classes = [name for name in rows.fieldnames or () if name.startswith("predicted_class")]
    if "output_length" not in (rows.fieldnames or ()) or not classes:
        raise WorkloadError(f"{path}, line 1: expected columns output_length and predicted_class_*")
    names = ["output_length", *classes]
    table = np.array(_parsed(rows, path, lambda row: [_int(row, name) for name in names]), np.int64)
    return OutputClasses(
        num_output_tokens=table[:, 0],
        predicted={name: table[:, column] for column, name in enumerate(classes, 1)},
    )


def _parsed(rows: csv.DictReader[str], path: str, parse: Callable[[Row], _T]) -> list[_T]:
    parsed = []
    for row in rows:
        try:
            if None in row or None in row.values():
                raise _Bad(f"not as many values as the header has columns, {len(rows.fieldnames or ())}")
            parsed.append(parse(row))
        except _Bad as bad:
            raise WorkloadError(f"{path}, line {rows.line_num}: {bad}") from None
    if not parsed:
        raise WorkloadError(f"{path} has a header and no rows")
    return parsed


def _request(arrival_s: float, num_prompt_tokens: int, num_output_tokens: int) -> TraceRequest:
    return TraceRequest(0, arrival_s, num_prompt_tokens, num_output_tokens, _NO_HASHES, NO_SESSION, 0, 0.0)


def _azure(row: Row) -> TraceRequest:
    text = row["TIMESTAMP"]
    try:
        # Seven decimals: datetime knows six.
        whole, _, fraction = text.partition(".")
        moment = datetime.fromisoformat(whole.strip())
        arrival_s = (moment - datetime(1970, 1, 1)).total_seconds() + float(f"0.{fraction or 0}")
    except (ValueError, TypeError):
        raise _Bad(f"TIMESTAMP is {text!r}, expected one like 2023-11-16 18:17:03.9799600") from None
    return _request(arrival_s, _int(row, "ContextTokens", 1), _int(row, "GeneratedTokens", 1))


def _lengths(row: Row) -> TraceRequest:
    return _request(0.0, _int(row, "input_length", 1), _int(row, "output_length", 1))


def _timed_lengths(row: Row) -> TraceRequest:
    return _lengths(row)._replace(arrival_s=_number(row, "timestamp_ms") / 1000)


def _plain(header: set[str]) -> Callable[[Row], TraceRequest]:
    def parse(row: Row) -> TraceRequest:
        prompt, output = _int(row, "num_prompt_tokens", 1), _int(row, "num_output_tokens", 1)
        request = _request(_number(row, "arrival_s"), prompt, output)
        if "session_id" not in header:
            return request
        return request._replace(
            session_id=_int(row, "session_id"),
            turn=_int(row, "turn") if "turn" in header else 0,
            think_s=_number(row, "think_s") if "think_s" in header else 0.0,
        )

    return parse


def _int(row: Row, name: str, at_least: int = 0) -> int:
    try:
        value = int(row[name])
    except ValueError:
        raise _Bad(f"{name} is {row[name]!r}, expected a whole number") from None
    if value < at_least:
        raise _Bad(f"{name} is {value}, expected at least {at_least}")
    return value


def _number(row: Row, name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        raise _Bad(f"{name} is {row[name]!r}, expected a number") from None
    if not 0 <= value < math.inf:
        raise _Bad(f"{name} is {row[name]}, expected a number of at least 0")
    return value
