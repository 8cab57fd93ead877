"""Replays of one setting, several seeds, as a row of a table or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from baton.replay.result import ReplayResult, Slo, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    trace: str
    fleet: str
    policy: str
    load: float | None
    """Share of capacity; None: the trace's own pace, or a given one."""
    rate_per_s: float
    results: tuple[ReplayResult, ...]
    """One per seed."""

    def numbers(self, slo: Slo) -> dict[str, Any]:
        """Means over the seeds; times in seconds."""
        each = [_numbers(result, slo) for result in self.results]
        return {name: fmean(numbers[name] for numbers in each) for name in each[0]}

    def as_json(self, slo: Slo) -> dict[str, Any]:
        return {
            "trace": self.trace,
            "fleet": self.fleet,
            "policy": self.policy,
            "load": self.load,
            "rate_per_s": self.rate_per_s,
            "slo": asdict(slo),
            **self.numbers(slo),
            "seeds": [_numbers(result, slo) for result in self.results],
        }


def _numbers(result: ReplayResult, slo: Slo) -> dict[str, float]:
    ttft, tpot = spread(result.ttft_s), spread(result.tpot_s)
    return {
        **{f"ttft_{name}_s": value for name, value in asdict(ttft).items()},
        **{f"tpot_{name}_s": value for name, value in asdict(tpot).items()},
        "goodput": result.goodput(slo),
        "hit_ratio": result.hit_ratio,
        "stay_ratio": result.stay_ratio,
        "prefill_imbalance": result.prefill_imbalance,
        "decode_imbalance": result.decode_imbalance,
        "num_rejected": result.num_rejected,
        "num_preemptions": result.num_preemptions,
        "requests_per_cpu_s": result.requests_per_cpu_s,
    }


HEADER = (
    "trace", "req/s", "policy", "TTFT mean", "p50", "p95", "p99 ms", "TPOT mean", "p50", "p95", "p99 ms",
    "goodput", "hits", "stayed", "P max/mean", "D max/mean", "rejected", "req/CPU-s",
)  # fmt: skip


def cells(row: Row, slo: Slo) -> tuple[str, ...]:
    n = row.numbers(slo)
    pace = f"{row.rate_per_s:.2f}" + (f" ({row.load:g})" if row.load is not None else "")
    names = ("mean", "p50", "p95", "p99")
    return (
        row.trace,
        pace,
        row.policy,
        *(f"{n[f'ttft_{name}_s'] * 1e3:,.0f}" for name in names),
        *(f"{n[f'tpot_{name}_s'] * 1e3:.2f}" for name in names),
        f"{n['goodput']:.1%}",
        f"{n['hit_ratio']:.1%}",
        f"{n['stay_ratio']:.1%}",
        f"{n['prefill_imbalance']:.2f}",
        f"{n['decode_imbalance']:.2f}",
        f"{n['num_rejected']:g}",
        f"{n['requests_per_cpu_s']:,.0f}",
    )


def table(rows: Sequence[Row], slo: Slo) -> str:
    lines = [HEADER, *(cells(row, slo) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
