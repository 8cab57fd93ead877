"""Jobs with known answers. Imported, not collected."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Callable

from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.simulated.model import SimulatedSequence
from baton.history import End
from tests.chaos.client import Job, ask
from tests.system.cases import random_prompt

MAX_MODEL_LEN = 2_048
NUM_BEGINNINGS, BEGINNING_TOKENS = 32, 64
"""Prompts begin with one of so many system prompts, so that prefixes are found and lost."""

NUM_REAL_PROMPTS = 40
GOLDEN_TIMEOUT_S = 120.0


def simulated_answer(prompt: list[int], max_tokens: int) -> list[int]:
    """What one simulated engine says that nobody disturbs."""
    sequence = SimulatedSequence(
        "", pack_token_ids(prompt), SamplingSpec(max_tokens=max_tokens, ignore_eos=True),
        max_model_len=MAX_MODEL_LEN, mean_output_tokens=None,
    )  # fmt: skip
    sequence.compute()
    return [token_id for _ in range(max_tokens) for token_id in sequence.advance().token_ids]


def simulated_jobs(
    output_tokens: tuple[int, int], *, share_leaving: float = 0.0, share_whole: float = 0.1, seed: int = 0
) -> Callable[[], Job]:
    """Of 65 to 264 prompt tokens. `share_leaving` of the clients hang up on the way, `share_whole` want the
    answer in one piece."""
    dice = random.Random(seed)
    numbers = itertools.count(1)
    beginnings = [[dice.randrange(1, 2_000) for _ in range(BEGINNING_TOKENS)] for _ in range(NUM_BEGINNINGS)]

    def next_job() -> Job:
        prompt = dice.choice(beginnings) + [dice.randrange(1, 2_000) for _ in range(dice.randint(1, 200))]
        max_tokens = dice.randint(*output_tokens)
        is_streamed = dice.random() >= share_whole
        leaves = is_streamed and dice.random() < share_leaving
        return Job(
            name=f"j{next(numbers)}",
            prompt=prompt,
            max_tokens=max_tokens,
            golden=simulated_answer(prompt, max_tokens),
            is_streamed=is_streamed,
            leaves_after=dice.randint(1, max_tokens) if leaves else None,
        )

    return next_job


def real_jobs(port: int) -> Callable[[], Job]:
    """Prompts of 40 to 400 tokens whose answers the fleet has just given, one after the other and
    undisturbed. Raises RuntimeError if it cannot."""
    dice = random.Random(0)
    known = [
        asyncio.run(
            _answered(port, random_prompt(dice.randint(40, 400), number), dice.randint(8, 48), number)
        )
        for number in range(NUM_REAL_PROMPTS)
    ]
    numbers = itertools.count(1)

    def next_job() -> Job:
        job = dice.choice(known)
        return dataclasses.replace(job, name=f"j{next(numbers)}", is_streamed=dice.random() >= 0.1)

    return next_job


async def _answered(port: int, prompt: list[int], max_tokens: int, number: int) -> Job:
    job = Job(name=f"golden{number}", prompt=prompt, max_tokens=max_tokens, golden=None)
    record = await ask(port, job, job.name, 0, GOLDEN_TIMEOUT_S)
    if record.end is not End.COMPLETED:
        raise RuntimeError(f"an undisturbed fleet did not answer: {record}")
    return dataclasses.replace(job, golden=record.token_ids)
