"""Who gives the client its first token.

The prefill worker has the logits of the last prompt token as soon as prefill ends, so its token
can be streamed while KV still moves; the decode worker then sees it as the end of the prompt.
That is the same answer unless something about the request tells output from prompt, or counts
draws of a random generator. Those requests get their first token from the decode worker, which
recomputes one position:

    seeded sampling    a seeded generator would start over on the decode worker
    penalties          presence and frequency count output tokens only
    structured output  the grammar must advance over every output token
    stop strings       a match may span the first and the second token
    bad words          likewise
    partial character  the first token ends inside a character: no text to show yet
    logprobs           where KV is streamed: the token travels with it, they do not

Where KV is streamed, the prefill worker's token follows it, and the decode worker goes on from both. It
tells the token again as its own first one; what the client has already is taken off (`without_repeated`).

`repetition_penalty` counts prompt and output alike and stays; `min_tokens` is carried over less
the token already given; logprobs of the first token travel with it.
"""

from __future__ import annotations

import msgspec

from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import RequestReport, SequenceDelta
from baton.contract.sampling import SamplingSpec


def reason_for_decode(sampling: SamplingSpec, *, is_streamed: bool = False) -> str | None:
    """Why the decode worker must sample the first token; None: the prefill worker's counts."""
    if sampling.max_tokens == 1:
        return None  # the prefill worker's token is the whole answer
    if sampling.seed is not None and sampling.temperature > 0:
        return "seeded sampling"
    if sampling.presence_penalty or sampling.frequency_penalty:
        return "penalties"
    if sampling.structured_output is not None:
        return "structured output"
    if sampling.stop:
        return "stop strings"
    if sampling.bad_words:
        return "bad words"
    if is_streamed and sampling.logprobs is not None:
        return "logprobs"
    return None


def is_usable(delta: SequenceDelta) -> bool:
    """Whether the prefill worker's token can be shown: it has text, or nothing will follow it."""
    return bool(delta.text) or delta.finish_reason is not None


def without_repeated(delta: SequenceDelta, given: SequenceDelta) -> SequenceDelta | None:
    """A decode worker's first delta less the token `given` by the prefill worker. None: it begins with
    another one, so it does not go on from what the client has."""
    num_given = len(given.token_ids)
    if delta.token_ids[:num_given] != given.token_ids or not delta.text.startswith(given.text):
        return None
    return msgspec.structs.replace(
        delta, token_ids=delta.token_ids[num_given:], text=delta.text.removeprefix(given.text)
    )


def prefill_spec(sampling: SamplingSpec, *, is_token_wanted: bool) -> SamplingSpec:
    """What the prefill worker samples with. A token that nobody will see is drawn greedily and
    can neither end the sequence nor compile a grammar."""
    if is_token_wanted:
        return sampling
    return SamplingSpec(
        max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=sampling.prompt_logprobs
    )


def seconds_to_first_token(report: RequestReport) -> float:
    """At the coordinator; the rest of the request's phases came after it."""
    phases = report.phases
    to_prefilled_s = phases.queue_s + phases.prefill_s
    is_by_prefill = report.placement.first_token_by is WorkerRole.PREFILL
    return to_prefilled_s if is_by_prefill else to_prefilled_s + phases.handoff_s
