"""Many requests through one fleet, and whether any answer holds something of another request.

Two tests of the same fault, that state of one request gets into another's:

* Golden prompts, asked again and again between others: each answer is the one that an engine alone
  gives, the last as the first (decay over many requests shows here).
* Canaries: each prompt has a few tokens of its own, and so have the tokens that its answer may be made
  of, all in flight at once. A foreign token in an answer is another's sampling state; own tokens in another
  order than alone are another's KV.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.client import AsyncBatonClient
from baton.contract.errors import ServingError
from baton.contract.sampling import SamplingSpec

VOCABULARY = 2000
NUM_OUTPUT_TOKENS = 12
GOLDEN_TOKENS = (40, 400)
FILLER_TOKENS = (10, 300)
CANARY_TOKENS = 8
CANARY_TURNS = 10
"""Of its canary between common words: 160 tokens and more."""
MAX_CANARIES = VOCABULARY // CANARY_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One prompt and what is known about its answer."""

    prompt: list[int]
    allowed_token_ids: list[int] | None = None
    """Its canary; None: it has none."""

    @property
    def sampling(self) -> SamplingSpec:
        return SamplingSpec(
            max_tokens=NUM_OUTPUT_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            allowed_token_ids=self.allowed_token_ids,
        )


@dataclass(slots=True)
class Verdicts:
    num_equal: int = 0
    num_different: int = 0
    num_foreign: int = 0
    """Answers with a token of another's canary."""
    num_unchecked: int = 0
    """Answered requests that are only load."""
    errors: Counter[str] = field(default_factory=Counter)
    """By code."""


def golden_questions(num_questions: int, seed: object = 0) -> list[Question]:
    rng = random.Random(f"golden {seed}")
    return [Question(_random_tokens(rng, rng.randint(*GOLDEN_TOKENS))) for _ in range(num_questions)]


def filler_questions(num_questions: int, seed: object = 0) -> list[Question]:
    rng = random.Random(f"filler {seed}")
    return [Question(_random_tokens(rng, rng.randint(*FILLER_TOKENS))) for _ in range(num_questions)]


def canary_questions(num_questions: int, seed: object = 0) -> list[Question]:
    """At most as many as there are disjoint canaries."""
    assert num_questions <= MAX_CANARIES
    rng = random.Random(f"canary {seed}")
    tokens = list(range(VOCABULARY))
    rng.shuffle(tokens)
    questions = []
    for number in range(num_questions):
        canary = tokens[number * CANARY_TOKENS : (number + 1) * CANARY_TOKENS]
        prompt: list[int] = []
        for _ in range(CANARY_TURNS):
            prompt += rng.sample(canary, CANARY_TOKENS)
            prompt += _random_tokens(rng, rng.randint(6, 14))
        questions.append(Question(prompt, allowed_token_ids=sorted(canary)))
    return questions


def interleaved(golden: Sequence[Question], num_requests: int, *, golden_every: int) -> list[Question]:
    """Every so manieth request is a golden one, in turn; the others are load of their own."""
    filler = iter(filler_questions(num_requests))
    return [
        golden[(number // golden_every) % len(golden)] if number % golden_every == 0 else next(filler)
        for number in range(num_requests)
    ]


async def ask_all(
    address: str, questions: Sequence[Question], expected: dict[Question, list[int]], *, concurrency: int
) -> Verdicts:
    """Through the ZeroMQ door at `address`. Questions without an expected answer are only asked."""
    verdicts = Verdicts()
    owner = {token: question for question in questions for token in question.allowed_token_ids or ()}
    places = asyncio.Semaphore(concurrency)

    async def one(question: Question) -> None:
        async with places:
            try:
                token_ids = await _answer(client, question)
            except ServingError as error:
                verdicts.errors[error.code] += 1
                return
        if any(owner.get(token, question) is not question for token in token_ids):
            verdicts.num_foreign += 1
        if question not in expected:
            verdicts.num_unchecked += 1
        elif token_ids == expected[question]:
            verdicts.num_equal += 1
        else:
            verdicts.num_different += 1

    async with AsyncBatonClient(address) as client:
        await asyncio.gather(*map(one, questions))
    return verdicts


async def _answer(client: AsyncBatonClient, question: Question) -> list[int]:
    sampling = question.sampling
    stream = client.submit(
        question.prompt,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        ignore_eos=sampling.ignore_eos,
        allowed_token_ids=sampling.allowed_token_ids,
    )
    return [token_id async for delta in stream for token_id in delta.token_ids]


def _random_tokens(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(num_tokens)]
