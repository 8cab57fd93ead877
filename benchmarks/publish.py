"""Shows a report, and saves it under results/ with the machine it was made on."""

from __future__ import annotations

import json
import sys

from benchmarks import machine
from benchmarks.figures import Report
from benchmarks.layout import RESULTS


def show(report: Report, *, as_json: bool) -> None:
    if as_json:
        for figure in report.figures:
            print(json.dumps(figure.as_json(), ensure_ascii=False))
        for remark in report.remarks:
            print(f"note: {remark}", file=sys.stderr)
        return
    print(report.table())
    print()
    for row, busy in report.busy_before.items():
        print(f"cores in use before {row}: {busy:.2f}")
    for remark in report.remarks:
        print(f"note: {remark}")
    for figure in report.missed:
        print(f"MISSED: {figure.name} is {figure.spread.median:.3g} {figure.unit}, bar {figure.bar}")


def save(report: Report, command: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    facts = machine.describe()
    (RESULTS / f"{report.benchmark}.json").write_text(report.json_document(facts, command), encoding="utf-8")
    (RESULTS / f"{report.benchmark}.md").write_text(report.markdown(facts, command), encoding="utf-8")
