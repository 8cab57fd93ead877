"""Step times of a running 1P1D fleet, from the phase times its coordinator reports.

Prompts one at a time give the prefill step and, by their length, the hand-off; answers at several
concurrencies give the decode step. What the coordinator and the sockets add is in them, as it is in
every request. Fits minimise relative errors with coefficients that are never negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

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


def measure_pace(address: str, *, repeats: int = 4) -> MeasuredPace:
    """Prompts share nothing with each other nor with any that other salts make."""
    alone = {
        length: play(address, _trace(repeats, length, 8), loop="one at a time", salt=1_000_000 + length)
        for length in PROMPT_LENGTHS
    }
    # The first of each length may find a kernel or a connection cold.
    prefill_s = {
        length: median(a.report.phases.prefill_s for a in found[1:]) for length, found in alone.items()
    }
    prefill = _fit([[1.0, length, prefill_pairs(length)] for length in prefill_s], list(prefill_s.values()))
    together = [(concurrency, length) for concurrency in CONCURRENCIES for length in (128, 1024)]
    rows, step_s = [], []
    for concurrency, length in together:
        trace = _trace(concurrency, length, NUM_OUTPUT_TOKENS)
        found = play(address, trace, salt=2_000_000 + 100 * length + concurrency)
        batch, seconds = _decode_batch(found)
        step_s.append(seconds)
        rows.append([1.0, batch, batch * (length + NUM_OUTPUT_TOKENS / 2)])
    base_s, per_decode_s, per_context_s = _fit(rows, step_s)
    decode = LinearStepTime(base_s=base_s, per_decode_s=per_decode_s, per_context_token_s=per_context_s)
    handoff_s = {
        length: median(answer.report.phases.handoff_s for answer in found[1:])
        - decode.step_s(StepWork(num_decodes=1, num_context_tokens=length))
        for length, found in alone.items()
    }
    latency_s, per_token_s = _fit(
        [[1.0, length] for length in handoff_s], [max(1e-4, value) for value in handoff_s.values()]
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
