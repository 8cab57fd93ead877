"""Requests sent to a running fleet at planned times, and when their tokens came.

Open loop: a request is sent when its time has come, whatever became of the others, and its latency counts
from the planned time. Prompts are random token ids without a seed: a prompt that was sent before, at another
rate or in another run, would be answered by the prefix cache.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

import numpy as np

from baton.client import AsyncBatonClient
from baton.contract.errors import ServingError
from placement.requests import Requests
from placement.simulator import Floats, Timings

FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 999
"""Ordinary words in every vocabulary we know."""

SILENCE_S = 60.0
"""A request that hears nothing for so long has failed."""


@dataclass(frozen=True, slots=True)
class Observed:
    timings: Timings
    """Infinite for requests that failed."""
    num_failed: int
    first_failure: str | None
    late_s: float
    """How long after its time the tardiest request was sent: more than a few ms, and this machine could not
    keep up as a client."""


async def play(address: str, requests: Requests, rate_per_s: float) -> Observed:
    """`address`: host:port of the coordinator's ZeroMQ door."""
    count = len(requests)
    ttft_s, tpot_s, late_s = np.full(count, np.inf), np.full(count, np.inf), np.zeros(count)
    failures: list[str] = []
    draw = random.Random()
    prompts = [
        draw.choices(range(FIRST_TOKEN_ID, LAST_TOKEN_ID + 1), k=int(length))
        for length in requests.num_prompt_tokens
    ]
    due: Floats = (requests.arrival - requests.arrival[0]) / rate_per_s
    async with AsyncBatonClient(address, timeout_s=SILENCE_S) as client, asyncio.TaskGroup() as tasks:
        start_s = time.perf_counter() + 0.05

        async def one(index: int) -> None:
            due_s = start_s + float(due[index])
            num_output = int(requests.num_output_tokens[index])
            try:
                stream = client.submit(
                    prompts[index], max_tokens=num_output, temperature=0.0, ignore_eos=True
                )
                first_s = last_s = 0.0
                async for delta in stream:
                    if delta.token_ids:
                        last_s = time.perf_counter()
                        first_s = first_s or last_s
                ttft_s[index] = first_s - due_s
                tpot_s[index] = (last_s - first_s) / max(1, num_output - 1)
            except ServingError as error:
                failures.append(f"{error.code}: {error}")

        for index in range(count):
            wait_s = start_s + float(due[index]) - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            late_s[index] = time.perf_counter() - start_s - float(due[index])
            tasks.create_task(one(index))
    return Observed(
        Timings(ttft_s, tpot_s), len(failures), failures[0] if failures else None, float(late_s.max())
    )


async def solo_times_s(
    address: str, num_prompt_tokens: int, *, repeats: int = 9
) -> list[tuple[float, float]]:
    """(to the first token, from there to the second) of requests that are alone in the fleet, after one that
    nobody counts."""
    draw = random.Random()
    found = []
    async with AsyncBatonClient(address, timeout_s=SILENCE_S) as client:
        for number in range(repeats + 1):
            prompt = draw.choices(range(FIRST_TOKEN_ID, LAST_TOKEN_ID + 1), k=num_prompt_tokens)
            started_s, heard_s = time.perf_counter(), []
            async for delta in client.submit(prompt, max_tokens=2, temperature=0.0, ignore_eos=True):
                if delta.token_ids:
                    heard_s.append(time.perf_counter())
            if number and heard_s:
                found.append((heard_s[0] - started_s, heard_s[-1] - heard_s[0]))
    return found
