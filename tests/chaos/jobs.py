"""Jobs with known answers. Imported, not collected."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.simulated_model import SimulatedSequence
from tests.chaos.client import Job

MAX_MODEL_LEN = 2_048
NUM_BEGINNINGS, BEGINNING_TOKENS = 32, 64
"""Prompts begin with one of so many system prompts, so that prefixes are found and lost."""


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
