"""What /v1/completions and /v1/chat/completions do alike, from a checked body to a started answer."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from baton.contract.errors import NoWorkers, UnknownModel
from baton.contract.sampling import SamplingSpec
from coordinator.http.answer import Answer, AnswerStyle, Prompt, start_answer
from coordinator.http.exchange import Exchange
from coordinator.http.limits import HttpSettings
from coordinator.http.sampling_rules import TokenLimits
from coordinator.http.streamed import StreamedAnswer, StreamedSequence
from coordinator.http.whole import CollectedSequence, WholeAnswer
from coordinator.intake import FleetFacts, Intake
from coordinator.metrics import Metrics
from coordinator.served_names import ServedNames
from coordinator.tokenizer import FleetTokenizer


class Door(Protocol):
    """What handlers use of the door."""

    settings: HttpSettings
    intake: Intake
    tokenizer: FleetTokenizer
    metrics: Metrics
    names: ServedNames
    version: str
    is_draining: bool

    def guarded(self, exchange: Exchange) -> AbstractContextManager[None]:
        """For work that goes on in a callback: turns what it raises into the exchange's answer."""


def served_model(asked: str | None, names: ServedNames) -> str:
    """The name to answer with. Raises NoWorkers before the first worker, UnknownModel for another."""
    served = names.names()
    if not served:
        raise NoWorkers("no worker has registered yet")
    if not asked:
        return served[0]
    if asked not in served:
        shown = ", ".join(served)
        raise UnknownModel(f"model {asked[:200]!r} is not served here; served: {shown}", param="model")
    return asked


def token_limits(facts: FleetFacts, tokenizer: FleetTokenizer) -> TokenLimits:
    if facts.max_model_len is None:
        raise NoWorkers("no worker has registered yet")
    return TokenLimits(max_model_len=facts.max_model_len, max_token_id=tokenizer.max_token_id)


def begin(
    door: Door, exchange: Exchange, style: AnswerStyle, prompts: Seq[Prompt], specs: Seq[SamplingSpec],
    n: int, is_stream: bool,
) -> None:  # fmt: skip
    """One sequence for each choice of each prompt. Raises what the core raises."""
    drafts = [
        (position * n + choice, prompt, _for_choice(spec, choice))
        for position, (prompt, spec) in enumerate(zip(prompts, specs, strict=True))
        for choice in range(n)
    ]

    def make() -> Answer:
        if is_stream:
            streamed = [StreamedSequence(*draft) for draft in drafts]
            return StreamedAnswer(exchange, door.intake, style, streamed)
        return WholeAnswer(exchange, door.intake, style, [CollectedSequence(*draft) for draft in drafts])

    start_answer(make, exchange)


def _for_choice(spec: SamplingSpec, choice: int) -> SamplingSpec:
    """Choices of a seeded request differ by one in their seeds, as vLLM's do."""
    if choice == 0 or spec.seed is None:
        return spec
    return msgspec.structs.replace(spec, seed=spec.seed + choice)
