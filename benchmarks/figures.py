"""What a benchmark hands over: figures, some of them with a bar, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.samples import Spread

QUIET_CORES = 0.1
"""With more in use before a row starts, somebody else works on this machine."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A promise about one figure."""

    sense: Literal["<=", ">="]
    limit: float

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.sense == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.sense} {self.limit:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    row: str
    """What was measured, for example `cpu_per_request_1k`."""
    subject: str
    """Who was measured, or `baton / vllm-router P/D` for a ratio."""
    unit: str
    spread: Spread
    bar: Bar | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.row}: {self.subject}"

    @property
    def holds(self) -> bool | None:
        return None if self.bar is None else self.bar.holds(self.spread.median)

    def as_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {
            "name": self.name,
            "value": _rounded(self.spread.median),
            "unit": self.unit,
            "bar": None if self.bar is None else str(self.bar),
            "holds": self.holds,
            "repeats": self.spread.num_repeats,
            "interval": [_rounded(self.spread.low), _rounded(self.spread.high)],
        }
        return line | ({"note": self.note} if self.note else {})


@dataclass(slots=True)
class Report:
    """Everything one run of one benchmark found."""

    benchmark: str
    figures: list[Figure] = field(default_factory=list)
    busy_before: dict[str, float] = field(default_factory=dict)
    """Cores in use before each row, everything under test up and idle."""
    remarks: list[str] = field(default_factory=list)

    @property
    def noisy_rows(self) -> list[str]:
        return [row for row, busy in self.busy_before.items() if busy > QUIET_CORES]

    @property
    def missed(self) -> list[Figure]:
        return [figure for figure in self.figures if figure.holds is False]

    def table(self) -> str:
        header = ("figure", "median", "range", "unit", "bar", "")
        rows = [
            (
                figure.name,
                _shown(figure.spread.median),
                f"{_shown(figure.spread.low)} – {_shown(figure.spread.high)}",
                figure.unit,
                str(figure.bar or ""),
                {True: "holds", False: "MISSED", None: ""}[figure.holds],
            )
            for figure in self.figures
        ]
        return aligned([header, *rows])

    def markdown(self, machine: dict[str, Any], command: str) -> str:
        lines = [f"# bench {self.benchmark}", "", f"`{command}`", ""]
        lines += [f"- {key}: {_inline(value)}" for key, value in machine.items()]
        lines += ["", "| figure | median | range | repeats | unit | bar | |", "|---|---|---|---|---|---|---|"]
        for figure in self.figures:
            lines.append(
                f"| {figure.name} | {_shown(figure.spread.median)} "
                f"| {_shown(figure.spread.low)} – {_shown(figure.spread.high)} | {figure.spread.num_repeats} "
                f"| {figure.unit} | {figure.bar or ''} "
                f"| {({True: 'holds', False: '**missed**', None: ''})[figure.holds]}"
                f"{' ' + figure.note if figure.note else ''} |"
            )
        if self.busy_before:
            busy = ", ".join(f"{row} {cores:.2f}" for row, cores in self.busy_before.items())
            lines += ["", f"Cores in use before each row (everything under test up and idle): {busy}."]
        lines += ["", *(f"- {remark}" for remark in self.remarks)]
        return "\n".join(lines).rstrip() + "\n"

    def json_document(self, machine: dict[str, Any], command: str) -> str:
        document = {
            "benchmark": self.benchmark,
            "command": command,
            "machine": machine,
            "busy_cores_before": {row: _rounded(busy) for row, busy in self.busy_before.items()},
            "figures": [figure.as_json() for figure in self.figures],
            "remarks": self.remarks,
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in (1, 2) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _shown(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
