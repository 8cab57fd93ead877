"""Many clients of one fleet, each with one request in flight, by default always. Imported, not collected.

A client asks again as openai-python does by itself (0.5 s doubling to 8 s, up to a quarter less by chance, or
`retry-after`): after a connection error and after statuses 408, 409, 429 and 5xx. That library does not
repeat a stream that breaks off; here the application behind it does, from the start. An error that came
inside a stream is the end of that job: it failed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from baton.history import Ask, End, RunWriter
from tests.chaos.client import Job, ask

SDK_RETRIES = 2
"""openai-python's default."""

MAX_RETRIES = 8
"""What a client here is given: about 40 s. A coordinator that is killed takes all connections with it, and
needs some seconds to be back with its workers."""

FIRST_DELAY_S, MAX_DELAY_S = 0.5, 8.0
MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Done:
    """How a job ended."""

    last: End
    num_asks: int


class Users:
    def __init__(
        self, port: int, writer: RunWriter, next_job: Callable[[], Job], *, timeout_s: float, seed: int = 0
    ) -> None:
        """`timeout_s`: the longest silence before a client calls its request hung."""
        self.done: list[Done] = []
        self.num_in_flight = 0
        self.most_in_flight = 0
        self._port = port
        self._writer = writer
        self._next_job = next_job
        self._timeout_s = timeout_s
        self._dice = random.Random(seed)

    async def run(
        self, num_users: int, is_over: Callable[[], bool], *, ramp_s: float = 0.0, think_s: float = 0.0
    ) -> None:
        """Returns when every user has seen `is_over` and finished its last job. Users arrive within
        `ramp_s`."""
        async with asyncio.TaskGroup() as group:
            for number in range(num_users):
                group.create_task(self._user(ramp_s * number / num_users, is_over, think_s))

    async def _user(self, delay_s: float, is_over: Callable[[], bool], think_s: float) -> None:
        await asyncio.sleep(delay_s)
        while not is_over():
            await self.serve(self._next_job())
            await asyncio.sleep(think_s)

    async def serve(self, job: Job) -> Ask:
        """Until it is answered, or there is no point in asking again."""
        number = 0
        while True:
            self.num_in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
            request_id = f"{job.name}.{number}"
            record = await ask(self._port, job, request_id, number, self._timeout_s)
            self.num_in_flight -= 1
            self._writer.ask(record)
            number += 1
            if number > MAX_RETRIES or not asks_again(record):
                self.done.append(Done(record.end, number))
                return record
            await asyncio.sleep(self._delay_s(record, number))

    def _delay_s(self, record: Ask, number: int) -> float:
        given_s = float(record.headers.get("retry-after", 0))
        if 0 < given_s <= MAX_RETRY_AFTER_S:
            return given_s
        delay_s: float = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (number - 1))
        return delay_s * (1 - 0.25 * self._dice.random())


def asks_again(record: Ask) -> bool:
    if record.end is End.CONNECTION_LOST:
        return True
    status = record.status or 0
    return record.end is End.REFUSED and (status in (408, 409, 429) or status >= 500)
