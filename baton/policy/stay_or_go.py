"""Stay or go: compute the rest of a prompt on its decode worker, or prefill elsewhere and move the KV.

A decode worker that holds most of a prompt (an earlier turn was decoded there) may compute the rest
sooner than a prefill worker gets to it. But a prompt in a decode step makes every running sequence
wait. Both ways are counted in request-seconds, from the step-time model of now:

    stay = rest queued there + one step with the rest in it + (that step - the step without it) x decodes
    go   = prompts queued at the prefill worker + this prompt's uncached tokens there + hand-off

and the request stays when that is strictly less. There is no threshold to set. What is not counted
would speak for staying: prompts behind this one at the prefill worker would gain, and chunked prefill
lets running sequences get on between chunks. Prompts queued somewhere are taken to be equally long,
which is the least their attention can cost.

Conditional disaggregation in Dynamo and llm-d compares the uncached length with a constant; a
constant knows neither queues nor batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.step_time.base import StepTime, StepWork, prefill_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast the fleet is, as far as it is known."""

    prefill: StepTime
    """Of a prefill worker."""
    decode: StepTime
    """Of a decode worker; its prefill terms say what a prompt costs there."""
    handoff_s: float
    """From a prompt computed to its first token on the decode worker, without the bytes' part."""
    handoff_per_byte_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """One worker's part of the question."""

    num_hit_tokens: int
    """Of this prompt, predicted, full blocks, less than the prompt."""
    num_queued_tokens: int
    """Uncached tokens of prompts ahead of this one."""
    num_waiting: int
    """How many prompts those are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    num_prompt_tokens: int
    there: Rest
    """At the chosen decode worker."""
    num_decodes: int
    """Sequences it is decoding."""
    num_context_tokens: int
    """Their KV tokens, summed."""
    prefill: Rest
    """At the chosen prefill worker."""
    num_bytes_to_move: int
    """KV that the decode worker does not hold yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Request-seconds of both ways, by part."""

    stay_queue_s: float
    stay_step_s: float
    stay_harm_s: float
    go_queue_s: float
    go_compute_s: float
    go_handoff_s: float

    @property
    def stay_s(self) -> float:
        return self.stay_queue_s + self.stay_step_s + self.stay_harm_s

    @property
    def go_s(self) -> float:
        return self.go_queue_s + self.go_compute_s + self.go_handoff_s

    @property
    def stays(self) -> bool:
        return self.stay_s < self.go_s


def costs(question: Question, pace: Pace) -> Costs:
    n, context = question.num_decodes, question.num_context_tokens
    there, prefill = question.there, question.prefill
    alone_s = pace.decode.step_s(StepWork(num_decodes=n, num_context_tokens=context))
    rest = _work(question.num_prompt_tokens, there.num_hit_tokens)
    shared_s = pace.decode.step_s(rest._replace(num_decodes=n, num_context_tokens=context))
    return Costs(
        stay_queue_s=pace.decode.step_s(_queued(there)),
        stay_step_s=shared_s,
        stay_harm_s=n * max(0.0, shared_s - alone_s),
        go_queue_s=pace.prefill.step_s(_queued(prefill)),
        go_compute_s=pace.prefill.step_s(_work(question.num_prompt_tokens, prefill.num_hit_tokens)),
        go_handoff_s=pace.handoff_s + pace.handoff_per_byte_s * question.num_bytes_to_move,
    )


def _work(num_prompt_tokens: int, num_hit_tokens: int) -> StepWork:
    num_new = num_prompt_tokens - num_hit_tokens
    return StepWork(num_prefill_tokens=num_new, num_prefill_pairs=prefill_pairs(num_new, num_hit_tokens))


def _queued(rest: Rest) -> StepWork:
    num_prompts = max(1, rest.num_waiting)
    mean = rest.num_queued_tokens / num_prompts
    pairs = rest.num_queued_tokens * (mean + 1) / 2
    return StepWork(num_prefill_tokens=rest.num_queued_tokens, num_prefill_pairs=pairs)
