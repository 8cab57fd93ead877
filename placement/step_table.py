"""A step-time model as arrays: what the compiled simulator reads.

Tabulated once per parallel configuration. Prefill: per number of new tokens an intercept and a slope per
query-key pair, linear between grid points. Decode: α and β per batch size, exact, since step times are
linear in the context by contract. `LinearStepTime` is met exactly; for other models
`max_prefill_error` says how far the table is off between its points.

Pipeline stages are folded in here. Decode runs one micro-batch per stage: a token takes as long as the
largest micro-batch needs through all stages, with the context spread evenly. Chunked steps alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.step_time import StepTime, StepWork, prefill_pairs

Floats = npt.NDArray[np.float64]

MAX_TABLE_TOKENS = 262_144
_GRID_RATIO = 1.19
"""Between neighbouring grid points: about a hundred of them up to the longest batch."""
_CONTEXT_PROBE = 4096


@dataclass(frozen=True, slots=True)
class StepTable:
    prefill: Floats
    """Rows: new tokens, step intercept, step slope per pair, cadence intercept, cadence slope."""
    alpha: Floats
    """Seconds of a decode step by batch size, without context."""
    beta: Floats
    """Per token of context, by batch size."""
    num_stages: int

    @property
    def max_batch(self) -> int:
        return len(self.alpha) - 1


@dataclass(frozen=True, slots=True)
class MixedTable:
    """Steps that hold a prompt chunk and decodes."""

    tokens: Floats
    batch: Floats
    terms: Floats
    """[intercept, per pair, per context token] × tokens × batch."""


def geometric_grid(highest: int, *, lowest: int = 1, ratio: float = _GRID_RATIO) -> list[int]:
    points = [lowest]
    while points[-1] < highest:
        points.append(max(points[-1] + 1, round(points[-1] * ratio)))
    return points


def tabulate(step_time: StepTime, *, num_stages: int, max_batch: int, max_tokens: int) -> StepTable:
    """`max_tokens`: the longest prompt or prefill batch the table is read at; beyond it, it extrapolates."""
    if not 1 <= max_tokens <= MAX_TABLE_TOKENS:
        raise ValueError(f"prompts of {max_tokens} tokens; the planner takes 1 to {MAX_TABLE_TOKENS}")
    tokens = geometric_grid(max(2, max_tokens))
    prefill = np.array([_prefill_row(step_time, count) for count in tokens]).T.copy()
    alpha, beta = np.zeros(max_batch + 1), np.zeros(max_batch + 1)
    known: dict[int, tuple[float, float]] = {}
    for batch in range(1, max_batch + 1):
        largest = -(-batch // num_stages)
        if largest not in known:
            known[largest] = _line(
                step_time.step_s(StepWork(num_decodes=largest, num_context_tokens=_CONTEXT_PROBE)),
                step_time.step_s(StepWork(num_decodes=largest, num_context_tokens=65 * _CONTEXT_PROBE)),
                _CONTEXT_PROBE, 65 * _CONTEXT_PROBE,
            )  # fmt: skip
        alpha[batch], beta[batch] = known[largest][0], known[largest][1] / num_stages
    return StepTable(prefill=prefill, alpha=alpha, beta=beta, num_stages=num_stages)


def tabulate_mixed(step_time: StepTime, *, num_stages: int, max_batch: int, budget_tokens: int) -> MixedTable:
    """`budget_tokens`: of one micro-batch; all stages together compute `num_stages` times that per round."""
    tokens = [1, *geometric_grid(budget_tokens, lowest=16, ratio=1.6)]
    batch = [0, *geometric_grid(-(-max_batch // num_stages), ratio=1.6)]
    if len(batch) == 2:
        batch.append(2)
    terms = np.zeros((3, len(tokens), len(batch)))
    for i, num_tokens in enumerate(tokens):
        low, high = prefill_pairs(num_tokens), prefill_pairs(num_tokens, 4 * max(budget_tokens, 1024))
        for j, num_decodes in enumerate(batch):
            context = _CONTEXT_PROBE if num_decodes else 0
            base = step_time.step_s(StepWork(num_tokens, low, num_decodes, context))
            more = step_time.step_s(StepWork(num_tokens, high, num_decodes, context))
            per_pair = (more - base) / (high - low)
            per_context = 0.0
            if num_decodes:
                longer = step_time.step_s(StepWork(num_tokens, low, num_decodes, 65 * context))
                per_context = (longer - base) / (64 * context)
            terms[0, i, j] = base - per_pair * low - per_context * context
            terms[1, i, j], terms[2, i, j] = per_pair / num_stages, per_context / num_stages
    return MixedTable(
        tokens=np.array(tokens, dtype=np.float64) * num_stages,
        batch=np.array(batch, dtype=np.float64) * num_stages,
        terms=terms,
    )


def max_prefill_error(table: StepTable, step_time: StepTime, max_tokens: int) -> float:
    """Largest relative error over single prompts and batches of eight, between the grid's points."""
    from placement.kernels.steps import prefill_step_s

    worst = 0.0
    for num_tokens in geometric_grid(max_tokens, lowest=8, ratio=1.07):
        for parts in (1, 8):
            pairs = parts * prefill_pairs(num_tokens / parts)  # type: ignore[arg-type]
            exact = step_time.step_s(StepWork(num_prefill_tokens=num_tokens, num_prefill_pairs=pairs))
            worst = max(worst, abs(prefill_step_s(table.prefill, float(num_tokens), pairs) / exact - 1))
    return worst


def _prefill_row(step_time: StepTime, num_tokens: int) -> tuple[float, ...]:
    one_prompt = prefill_pairs(num_tokens)
    many_prompts = one_prompt / 8
    works = [StepWork(num_prefill_tokens=num_tokens, num_prefill_pairs=p) for p in (many_prompts, one_prompt)]
    step = _line(step_time.step_s(works[0]), step_time.step_s(works[1]), many_prompts, one_prompt)
    cadence = _line(step_time.cadence_s(works[0]), step_time.cadence_s(works[1]), many_prompts, one_prompt)
    return float(num_tokens), *step, *cadence


def _line(y_low: float, y_high: float, x_low: float, x_high: float) -> tuple[float, float]:
    slope = (y_high - y_low) / (x_high - x_low)
    return y_low - slope * x_low, slope
