"""Rows of a replay as a picture: time to first token, time per token, goodput; a line per policy over
the load, or bars where there is one load only."""

from __future__ import annotations

from collections.abc import Sequence

from baton.replay.result import Slo
from baton.replay.table import Row

_PANELS = (
    ("ttft_mean_s", "mean TTFT, ms", 1e3),
    ("ttft_p99_s", "p99 TTFT, ms", 1e3),
    ("tpot_mean_s", "mean TPOT, ms", 1e3),
    ("goodput", "goodput, %", 100),
)


def plot(rows: Sequence[Row], slo: Slo, path: str) -> None:
    """Raises OSError or ValueError where the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = list(dict.fromkeys(row.trace for row in rows))
    figure, axes = pyplot.subplots(
        len(traces), len(_PANELS), figsize=(4 * len(_PANELS), 3.2 * len(traces)), squeeze=False
    )
    for line, trace in zip(axes, traces, strict=True):
        mine = [row for row in rows if row.trace == trace]
        policies = list(dict.fromkeys(row.policy for row in mine))
        paces = sorted({row.rate_per_s for row in mine})
        for axis, (key, label, scale) in zip(line, _PANELS, strict=True):
            for number, policy in enumerate(policies):
                points = [
                    (row.rate_per_s, row.numbers(slo)[key] * scale) for row in mine if row.policy == policy
                ]
                if len(paces) > 1:
                    axis.plot(*zip(*sorted(points), strict=True), marker="o", label=policy)
                else:
                    axis.bar(number, points[0][1], label=policy)
            axis.set_title(f"{trace}: {label}", fontsize=9)
            if len(paces) > 1:
                axis.set_xlabel("requests/s")
            else:
                axis.set_xticks([])
        line[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
