"""A trace sent to a running fleet through the ZeroMQ door, and what came of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import uvloop

from baton.client import AsyncBatonClient
from baton.contract.errors import ServingError
from baton.contract.messages import RequestReport
from baton.workload import Trace, prompt_token_ids

FIRST_TOKEN_ID, VOCABULARY_SIZE = 100, 2000
"""Of made-up prompts: inside the demo model's vocabulary, without its special tokens."""

Loop = Literal["open", "closed", "one at a time"]


@dataclass(frozen=True, slots=True)
class Answered:
    position: int
    """In the trace."""
    sent_s: float
    """From the start of the run; monotonic."""
    ttft_s: float
    e2e_s: float
    num_output_tokens: int
    report: RequestReport

    @property
    def tpot_s(self) -> float:
        return (self.e2e_s - self.ttft_s) / max(1, self.num_output_tokens - 1)


class RequestsFailed(Exception):
    """Some requests of a run were not answered; the message has the first one's reason."""


def play(
    address: str, trace: Trace, *, loop: Loop = "open", salt: int = 0, max_in_flight: int | None = None
) -> list[Answered]:
    """Blocks until all are answered, in the order of the trace. `salt` makes prompts that share nothing
    with another run's.

    open: at their arrivals · closed: a session's next turn `think_s` after its answer · one at a time:
    each after the one before it. `max_in_flight` holds back what arrives beyond it.
    """
    prompts = [
        prompt_token_ids(
            trace, index, vocabulary_size=VOCABULARY_SIZE, first_token_id=FIRST_TOKEN_ID, salt=salt
        ).tolist()
        for index in range(len(trace))
    ]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_play(address, trace, prompts, loop, max_in_flight))


async def _play(
    address: str, trace: Trace, prompts: list[list[int]], loop: Loop, max_in_flight: int | None
) -> list[Answered]:
    answered: list[Answered] = []
    failed: list[str] = []
    start_s = time.monotonic()
    places = asyncio.Semaphore(max_in_flight or len(trace))

    async with AsyncBatonClient(address) as client:

        async def one(position: int) -> None:
            async with places:
                sent_s = time.monotonic()
                first_s = last_s = 0.0
                try:
                    stream = client.submit(
                        prompts[position],
                        max_tokens=int(trace.num_output_tokens[position]),
                        temperature=0.0,
                        ignore_eos=True,
                    )
                    num_tokens = 0
                    async for delta in stream:
                        last_s = time.monotonic()
                        first_s = first_s or last_s
                        num_tokens += len(delta.token_ids)
                except ServingError as error:
                    failed.append(str(error))
                    return
            assert stream.report is not None
            answered.append(
                Answered(
                    position, sent_s - start_s, first_s - sent_s, last_s - sent_s, num_tokens, stream.report
                )
            )

        async def session(positions: Sequence[int]) -> None:
            for number, position in enumerate(positions):
                if loop != "one at a time":
                    wait_s = start_s + float(trace.arrival_s[position]) - time.monotonic()
                    await asyncio.sleep(wait_s if number == 0 else trace[position].think_s)
                await one(position)

        async with asyncio.TaskGroup() as group:
            for positions in _chains(trace, loop):
                group.create_task(session(positions))
    if failed:
        raise RequestsFailed(f"{len(failed)} of {len(trace)} requests failed, the first: {failed[0]}")
    return sorted(answered, key=lambda answer: answer.position)


def _chains(trace: Trace, loop: Loop) -> list[list[int]]:
    """Requests that wait for one another."""
    if loop == "open" or (loop == "closed" and not len(trace.session_ids)):
        return [[position] for position in range(len(trace))]
    if loop == "one at a time":
        return [list(range(len(trace)))]
    chains: dict[int, list[int]] = {}
    for position, session in enumerate(trace.session_ids.tolist()):
        chains.setdefault(session, []).append(position)
    return list(chains.values())
