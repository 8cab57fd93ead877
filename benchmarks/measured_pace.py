"""Step times of a running 1P1D fleet, from the phase times its coordinator reports.

Prompts one at a time give the prefill step and, by their length, the hand-off; answers at several
concurrencies give the decode step. What the coordinator and the sockets add is in them, as it is in
every request. Fits minimise relative errors with coefficients that are never negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from baton.contract.messages import RequestReport
from baton.step_time import KvLink, LinearStepTime, StepWork, prefill_pairs
from baton.step_time.least_squares import non_negative_least_squares
from baton.workload import SingleTurnWorkload, Trace, parse_lengths
from benchmarks.trace_load import Answered, play

PROMPT_LENGTHS = (64, 256, 512, 1024, 1536, 2048)
CONCURRENCIES = (1, 4, 8, 16)
NUM_OUTPUT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPace:
    prefill: LinearStepTime
    decode: LinearStepTime
    """Without prefill terms; a decode worker of these benches never computes a prompt."""
    handoff: KvLink
    """As if the bytes were tokens: `transfer_s(num_prompt_tokens)`."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One pass over all lengths and concurrencies."""

    alone: dict[int, list[Answered]]
    """By prompt length, one at a time."""
    together: list[tuple[int, list[Answered]]]
    """Prompt length, and what was answered at once."""


def observe(address: str, *, number: int, repeats: int = 4) -> Observed:
    """Prompts share nothing with those of another number."""
    salt = 10_000_000 * (number + 1)
    return Observed(
        {
            length: play(address, _trace(repeats, length, 8), loop="one at a time", salt=salt + length)
            for length in PROMPT_LENGTHS
        },
        [
            (length, play(address, _trace(size, length, NUM_OUTPUT_TOKENS), salt=salt + 100 * length + size))
            for size in CONCURRENCIES
            for length in (128, 1024)
        ],
    )


def fit_pace(observed: Sequence[Observed]) -> MeasuredPace:
    """Of all passes together: before and after what is to be predicted, a drift of the machine between
    them counts half."""
    alone: dict[int, list[RequestReport]] = {length: [] for length in PROMPT_LENGTHS}
    for run in observed:
        for length, found in run.alone.items():
            # The first of each length may find a kernel or a connection cold.
            alone[length] += [answer.report for answer in found[1:]]
    prefill = _fit(
        [[1.0, length, prefill_pairs(length)] for length in alone],
        [median(report.phases.prefill_s for report in reports) for reports in alone.values()],
    )
    rows, step_s = [], []
    for length, found in [batch for run in observed for batch in run.together]:
        batch, seconds = _decode_batch(found)
        step_s.append(seconds)
        rows.append([1.0, batch, batch * (length + NUM_OUTPUT_TOKENS / 2)])
    base_s, per_decode_s, per_context_s = _fit(rows, step_s)
    decode = LinearStepTime(base_s=base_s, per_decode_s=per_decode_s, per_context_token_s=per_context_s)
    handoff_s = [
        median(report.phases.handoff_s for report in reports)
        - decode.step_s(StepWork(num_decodes=1, num_context_tokens=length))
        for length, reports in alone.items()
    ]
    latency_s, per_token_s = _fit(
        [[1.0, length] for length in alone], [max(1e-4, seconds) for seconds in handoff_s]
    )
    return MeasuredPace(
        prefill=LinearStepTime(
            base_s=prefill[0], per_prefill_token_s=prefill[1], per_prefill_pair_s=prefill[2]
        ),
        decode=decode,
        handoff=KvLink(bytes_per_s=1 / max(per_token_s, 1e-9), latency_s=latency_s),
    )


def _trace(num_requests: int, length: int, num_output_tokens: int) -> Trace:
    return SingleTurnWorkload(
        num_requests=num_requests,
        rate_per_s=1e6,
        prompt=parse_lengths(f"fixed:{length}"),
        output=parse_lengths(f"fixed:{num_output_tokens}"),
    ).generate(seed=1)


def _decode_batch(found: list[Answered]) -> tuple[float, float]:
    """(sequences in a step, its seconds), averaged: while some are still being prefilled, others decode
    in smaller batches."""
    ends = [answer.sent_s + answer.e2e_s for answer in found]
    decode_s = [answer.report.phases.decode_s for answer in found]
    starts = [end - seconds for end, seconds in zip(ends, decode_s, strict=True)]
    # One token came from the prefill worker, the first of the decode worker ends the hand-off.
    num_steps = sum(answer.num_output_tokens - 2 for answer in found)
    return sum(decode_s) / (max(ends) - min(starts)), sum(decode_s) / num_steps


def _fit(rows: list[list[float]], seconds: list[float]) -> list[float]:
    target = np.array(seconds)
    fitted: list[float] = non_negative_least_squares(
        np.array(rows) / target[:, None], np.ones(len(target))
    ).tolist()
    return fitted
