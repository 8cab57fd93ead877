"""Nothing of one request gets into another's answer: golden prompts between others, and canaries.

A short run of what `scripts/bench.sh correctness` does with 2,000 requests and 240 canaries. Token by token
the prefill worker gives the right answers: one of one token needs no transfer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.cross_talk import Question, ask_all, canary_questions, golden_questions, interleaved
from tests.system.fleet import Fleet

NUM_GOLDEN = 6
NUM_REQUESTS = 60
NUM_CANARIES = 40
CONCURRENCY = 16


def right_answers(fleet: Fleet, questions: Sequence[Question]) -> dict[Question, list[int]]:
    def answer(question: Question) -> list[int]:
        token_ids: list[int] = []
        for _ in range(question.sampling.max_tokens):
            one = fleet.complete(
                [*question.prompt, *token_ids],
                max_tokens=1,
                temperature=0,
                ignore_eos=True,
                allowed_token_ids=question.allowed_token_ids,
                return_token_ids=True,
            )
            assert one.status == 200, one.body
            token_ids += one.json["choices"][0]["token_ids"]
        return token_ids

    with ThreadPoolExecutor(CONCURRENCY) as threads:
        return dict(zip(questions, threads.map(answer, questions), strict=True))


@pytest.mark.parametrize("kind", ["golden", "canary"])
def test_answers_are_those_of_an_engine_alone(real_fleet: Fleet, kind: str) -> None:
    if kind == "golden":
        checked = golden_questions(NUM_GOLDEN, seed="test")
        questions = interleaved(checked, NUM_REQUESTS, golden_every=3)
        concurrency = CONCURRENCY
    else:
        checked = questions = canary_questions(NUM_CANARIES, seed="test")
        concurrency = len(questions)
    expected = right_answers(real_fleet, checked)
    verdicts = asyncio.run(ask_all(real_fleet.client_address, questions, expected, concurrency=concurrency))
    assert not verdicts.errors
    assert verdicts.num_different == 0
    assert verdicts.num_foreign == 0
    assert verdicts.num_equal == sum(question in expected for question in questions)
    real_fleet.wait_until_idle()


def test_canaries_would_be_noticed() -> None:
    """Each answer may hold only tokens of its own canary, and no two canaries share one."""
    questions = canary_questions(NUM_CANARIES)
    tokens = [token for question in questions for token in question.allowed_token_ids or ()]
    assert len(set(tokens)) == len(tokens) == 8 * NUM_CANARIES
    assert all(set(question.allowed_token_ids or ()) <= set(question.prompt) for question in questions)
