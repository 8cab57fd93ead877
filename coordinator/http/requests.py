"""What /v1/completions and /v1/chat/completions do alike, from a checked body to a started answer."""

from __future__ import annotations

from collections.abc import Sequence as Seq
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
from coordinator.tokenizer import FleetTokenizer


class Door(Protocol):
    """What handlers use of the door."""

    settings: HttpSettings
    intake: Intake
    tokenizer: FleetTokenizer
    metrics: Metrics
    version: str
    is_draining: bool

    def guarded(self, exchange: Exchange) -> Guard:
        """For work that goes on in a callback: turns what it raises into the exchange's answer."""


class Guard(Protocol):
    def __enter__(self) -> None: ...
    def __exit__(self, *raised: object) -> bool: ...


def model_names(facts: FleetFacts, settings: HttpSettings) -> tuple[str, ...]:
    """Names a client may use, the preferred one first; empty while no worker has registered."""
    if facts.model is None:
        return ()
    if settings.served_model_names:
        return settings.served_model_names
    short = facts.model.rstrip("/").rpartition("/")[2]
    return (facts.model,) if short == facts.model else (facts.model, short)


def served_model(asked: str | None, facts: FleetFacts, settings: HttpSettings) -> str:
    """The name to answer with. Raises NoWorkers before the first worker, UnknownModel for another."""
    names = model_names(facts, settings)
    if not names:
        raise NoWorkers("no worker has registered yet", retry_after_s=1.0)
    if not asked:
        return names[0]
    if asked not in names:
        raise UnknownModel(f"model {asked!r} is not served here; {' and '.join(names)} is", param="model")
    return asked


def token_limits(facts: FleetFacts, tokenizer: FleetTokenizer) -> TokenLimits:
    if facts.max_model_len is None:
        raise NoWorkers("no worker has registered yet", retry_after_s=1.0)
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
