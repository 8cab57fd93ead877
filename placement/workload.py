"""What the fleet will be asked: a trace, a histogram or written-down distributions, as request sets.

Several sets are drawn, of at least 10,000 requests each, so that intervals can be told. A trace is drawn in
blocks of consecutive requests with their gaps: bursts and slow drifts inside a block stay as recorded.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baton.workload import Lengths, Trace, WorkloadError, parse_lengths, read_trace
from baton.workload.retiming import gamma_gaps
from placement.requests import MIN_REQUESTS, Floats, Ints, Requests, make_requests
from placement.step_table import MAX_TABLE_TOKENS

NUM_SETS = 4
BLOCK_REQUESTS = 250
"""Of a trace, drawn together."""
HISTOGRAM_COLUMNS = ("num_prompt_tokens", "num_output_tokens", "count")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths, and gaps if they were recorded."""

    name: str
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    num_cached_tokens: Ints
    gaps: Floats | None = None
    """Seconds before each request; None: drawn, see `burstiness`."""
    burstiness: float = 1.0
    """CV of drawn gaps; 1 is Poisson."""
    weights: Floats | None = None
    """Of the rows of a histogram."""
    notes: tuple[str, ...] = ()

    @property
    def rate_per_s(self) -> float | None:
        """As recorded."""
        if self.gaps is None or not self.gaps.sum() > 0:
            return None
        return len(self.gaps) / float(self.gaps.sum())

    def request_sets(
        self, num_requests: int = MIN_REQUESTS, num_sets: int = NUM_SETS, seed: int = 0
    ) -> tuple[Requests, ...]:
        """A trial takes `num_requests` of a set, or up to four times as many for a large fleet."""
        return tuple(
            self._draw(num_requests, 4 * num_requests, np.random.default_rng([seed, k]), k)
            for k in range(num_sets)
        )

    def _draw(self, per_trial: int, count: int, rng: np.random.Generator, number: int) -> Requests:
        size = len(self.num_prompt_tokens)
        if self.gaps is None:
            share = None if self.weights is None else self.weights / self.weights.sum()
            rows = rng.choice(size, count, p=share)
            gaps = gamma_gaps(count, 1.0, self.burstiness, rng)
        else:
            block = min(BLOCK_REQUESTS, size)
            starts = rng.integers(0, size, -(-count // block))
            rows = ((starts[:, None] + np.arange(block)[None, :]) % size).ravel()[:count]
            gaps = self.gaps[rows]
        return make_requests(
            self.num_prompt_tokens[rows], self.num_output_tokens[rows], gaps=gaps,
            num_cached_tokens=self.num_cached_tokens[rows], seed=number, name=self.name,
            per_trial=per_trial,
        )  # fmt: skip

    def sentence(self) -> str:
        prompt, output = self.num_prompt_tokens, self.num_output_tokens
        weights = self.weights
        mean_p, mean_o = np.average(prompt, weights=weights), np.average(output, weights=weights)
        hits = np.average(self.num_cached_tokens, weights=weights) / mean_p
        text = f"{self.name}: prompts of {mean_p:,.0f} tokens on average (99 % up to "
        text += f"{_p99(prompt, weights):,.0f}), outputs of {mean_o:,.0f} ({_p99(output, weights):,.0f})"
        return text + (f", {hits:.0%} of prompt tokens cached" if hits else "")


def load_workload(
    text: str, *, burstiness: float | None = None, prefix_hits: float | None = None, seed: int = 0
) -> Workload:
    """A file (trace or histogram), or `PROMPT/OUTPUT` lengths such as `lognormal:755,1/lognormal:200,1`.

    `burstiness` replaces recorded gaps; `prefix_hits` is the share of each prompt found in a cache and
    replaces what a trace's hashes say. Raises WorkloadError."""
    if burstiness is not None and not (0 <= burstiness < 100):
        raise WorkloadError(f"--burstiness is {burstiness:g}, expected 0 (even) to 100; 1 is Poisson")
    if prefix_hits is not None and not 0 <= prefix_hits < 1:
        raise WorkloadError(f"--prefix-hits is {prefix_hits:g}, expected at least 0 and below 1")
    if "/" in text and ":" in text and not Path(text).exists():
        prompt, _, output = text.partition("/")
        found = _parametric(text, parse_lengths(prompt), parse_lengths(output), seed)
    elif not Path(text).exists():
        raise WorkloadError(
            f"--workload {text!r} is neither a file nor lengths like lognormal:755,1/lognormal:200,1"
        )
    else:
        found = _histogram(Path(text)) or _of_trace(read_trace(text))
    return _adjusted(found, burstiness, prefix_hits)


def _adjusted(found: Workload, burstiness: float | None, prefix_hits: float | None) -> Workload:
    longest = int((found.num_prompt_tokens + found.num_output_tokens).max())
    if longest > MAX_TABLE_TOKENS:
        raise WorkloadError(
            f"{found.name}: a request of {longest:,} tokens, the planner takes up to {MAX_TABLE_TOKENS:,}"
        )
    cached = found.num_cached_tokens
    if prefix_hits is not None:
        cached = (found.num_prompt_tokens * prefix_hits).astype(np.int64)
    return Workload(
        name=found.name, num_prompt_tokens=found.num_prompt_tokens, num_output_tokens=found.num_output_tokens,
        num_cached_tokens=cached, gaps=found.gaps if burstiness is None else None,
        burstiness=1.0 if burstiness is None else burstiness, weights=found.weights, notes=found.notes,
    )  # fmt: skip


def _parametric(text: str, prompt: Lengths, output: Lengths, seed: int) -> Workload:
    rng = np.random.default_rng([seed, 99])
    prompts, outputs = prompt.sample(rng, 50_000), output.sample(rng, 50_000)
    return Workload(
        name=text, num_prompt_tokens=prompts, num_output_tokens=outputs,
        num_cached_tokens=np.zeros(len(prompts), np.int64),
    )  # fmt: skip


def _of_trace(trace: Trace) -> Workload:
    gaps = None
    notes: list[str] = []
    if trace.has_arrivals and trace.rate_per_s > 0:
        gaps = np.diff(trace.arrival_s, prepend=trace.arrival_s[0] - 1 / trace.rate_per_s)
    else:
        notes.append(f"{trace.name} has no arrival times: Poisson arrivals are assumed")
    if len(trace) < 1000:
        notes.append(f"{trace.name} has {len(trace)} requests only: rare lengths are under-represented")
    cached = ideal_hits(trace)
    if cached.any():
        notes.append(
            "prefix hits are those of one unbounded cache, the ceiling for any routing; see --prefix-hits"
        )
    prompt, output = np.maximum(1, trace.num_prompt_tokens), np.maximum(1, trace.num_output_tokens)
    return Workload(
        name=trace.name, num_prompt_tokens=prompt, num_output_tokens=output, num_cached_tokens=cached,
        gaps=gaps, notes=tuple(notes),
    )  # fmt: skip


def ideal_hits(trace: Trace) -> Ints:
    """Per request the prompt tokens that an unbounded cache of all earlier prompts holds."""
    hits = np.zeros(len(trace), np.int64)
    seen: set[int] = set()
    for index, hashes in enumerate(trace.block_hashes):
        leading = hashes[: trace.num_full_blocks(index)].tolist()
        count = next((n for n, block in enumerate(leading) if block not in seen), len(leading))
        hits[index] = count * trace.block_size_tokens
        seen.update(leading)
    return hits


def _histogram(path: Path) -> Workload | None:
    """None: not a histogram. Columns: num_prompt_tokens, num_output_tokens, count."""
    if path.suffix != ".csv":
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if set(rows.fieldnames or ()) != set(HISTOGRAM_COLUMNS):
                return None
            values: list[list[float]] = []
            for number, row in enumerate(rows, 2):
                try:
                    values.append([float(row[name]) for name in HISTOGRAM_COLUMNS])
                except (TypeError, ValueError):
                    raise WorkloadError(f"{path}, line {number}: expected three numbers, got {row}") from None
                if not (values[-1][0] >= 1 and values[-1][1] >= 1 and values[-1][2] >= 0):
                    raise WorkloadError(
                        f"{path}, line {number}: lengths start at 1 and counts at 0, got {row}"
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error
    table = np.array(values).reshape(-1, 3)
    if not table[:, 2].sum() > 0:
        raise WorkloadError(f"{path} has no rows with a count above 0")
    return Workload(
        name=path.stem, num_prompt_tokens=table[:, 0].astype(np.int64),
        num_output_tokens=table[:, 1].astype(np.int64), num_cached_tokens=np.zeros(len(table), np.int64),
        weights=table[:, 2],
    )  # fmt: skip


def _p99(values: Ints, weights: Floats | None) -> float:
    if weights is None:
        return float(np.percentile(values, 99))
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(reached, 0.99)])
