"""Whether a request can still be answered by its deadline. Facts in, seconds out; no I/O.

What is estimated is the least it can take: the wait in line at the measured rate, then the shortest
queue of a prefill worker, the prompt without the longest prefix that anybody holds, the hand-off, and
as many steps of the smallest decode batch, as it is now, as the answer certainly has. What was not
measured counts as nothing, so a request is never refused on a guess; and since everything is the least,
one that is refused would have missed its deadline and cost others their prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.contract.sampling import SamplingSpec
from baton.policy.ledger import Pool
from baton.policy.stay_or_go import Pace, Question, Rest, costs
from baton.step_time.base import StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds, each 0 where nothing is known."""

    line_s: float
    """Until a worker takes it."""
    service_s: float
    """From there to its last token."""

    @property
    def total_s(self) -> float:
        return self.line_s + self.service_s

    def sentence(self, left_s: float) -> str:
        return (
            f"it needs at least {self.total_s:.3g} s ({self.line_s:.3g} s in line, {self.service_s:.3g} s "
            f"of work) and has {max(0.0, left_s):.3g} s"
        )


def least_output_tokens(sampling: SamplingSpec) -> int:
    """What the answer has at least; the client's own guess where it gives one."""
    if sampling.ignore_eos:
        return sampling.max_tokens
    guess = None if sampling.service is None else sampling.service.expected_output_tokens
    return max(1, sampling.min_tokens, min(sampling.max_tokens, guess or 1))


def service_s(
    num_prompt_tokens: int,
    num_hit_tokens: int,
    num_output_tokens: int,
    prefill: Pool,
    decode: Pool,
    pace: Pace,
) -> float:
    """From leaving the line to the last token, at the least.
    `num_hit_tokens`: of the worker that holds most of the prompt."""
    if not prefill or not decode:
        return 0.0
    shortest = min(prefill, key=lambda account: account.num_queued_tokens)
    smallest = min(decode, key=lambda account: account.load.num_running)
    nothing = Rest(num_hit_tokens=0, num_queued_tokens=0, num_waiting=0)
    ahead = Rest(
        num_hit_tokens=min(num_hit_tokens, num_prompt_tokens - 1),
        num_queued_tokens=shortest.num_queued_tokens,
        num_waiting=shortest.num_waiting,
    )
    question = Question(
        num_prompt_tokens=num_prompt_tokens,
        there=nothing,
        num_decodes=0,
        num_context_tokens=0,
        prefill=ahead,
        num_bytes_to_move=0,
    )
    parts = costs(question, pace)
    to_first_s = parts.go_queue_s + parts.go_compute_s
    if num_output_tokens == 1:
        return to_first_s
    step = StepWork(num_decodes=smallest.load.num_running + 1, num_context_tokens=smallest.num_kv_tokens)
    # The hand-off ends with the decode worker's first token, the answer's second.
    return to_first_s + parts.go_handoff_s + (num_output_tokens - 2) * pace.decode.step_s(step)
