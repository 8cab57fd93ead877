"""Shortest remaining prefill first, with ageing: the order on a prefill worker.

A prompt's cost is known, so no levels are needed: rank = cost that remains + `ageing` x arrival time.
Waiting counts like having less to do, at `ageing` seconds per second, which makes ageing relative to
length: whoever needs c seconds can be overtaken only by prompts that arrive within c / `ageing` of it.
A flat deadline would let everyone overdue jump the queue, and at high load everyone is overdue.

Chunked prefill gives the preemption points. A prompt that has begun keeps its blocks, so at most
`max_open` are begun at any time: half-computed prompts that fill the memory would block each other for
ever. A prompt short enough to be computed in one step is never half-computed and always may begin.

Optimises the mean time to first token. The longest percent of the prompts waits up to three times longer.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

from baton.scheduling.base import JobFacts, Ranked

MAX_OPEN = 1
AGEING = 0.05
PER_TOKEN_S = 50e-6
CHUNK_TOKENS = 2048


class ShortestPrefill(Ranked):
    name = "shortest-prefill"

    def __init__(
        self,
        ageing: float = AGEING,
        max_open: int = MAX_OPEN,
        *,
        per_token_s: float = PER_TOKEN_S,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """`per_token_s`: seconds for a prompt token, from a profile; it only scales the ageing.
        `chunk_tokens`: prompt tokens that fit in one step."""
        super().__init__()
        if max_open < 1 or ageing < 0 or per_token_s <= 0 or chunk_tokens < 1:
            raise ValueError(
                f"max_open {max_open} and chunk {chunk_tokens} must be at least 1, ageing {ageing:g} not "
                f"negative, {per_token_s:g} s per token above 0"
            )
        self._max_open = max_open
        self._per_token = ageing / per_token_s
        self._chunk_tokens = chunk_tokens
        self._turn = count()
        self._num_left: dict[str, int] = {}
        self._open: set[str] = set()

    def _first_rank(self, job: JobFacts, now_s: float) -> tuple[float, ...]:
        self._num_left[job.job_id] = job.num_uncached_tokens
        return (job.priority, job.num_uncached_tokens + self._per_token * job.arrival_s, next(self._turn))

    def charge(
        self, job_id: str, *, num_prefill_tokens: int = 0, num_output_tokens: int = 0, now_s: float
    ) -> None:
        self._num_left[job_id] -= num_prefill_tokens
        priority, rank, turn = self._ranks[job_id]
        self._ranks[job_id] = (priority, rank - num_prefill_tokens, turn)
        if num_prefill_tokens:
            self._open.add(job_id)
        if self._num_left[job_id] <= 0:
            self._open.discard(job_id)

    def remove(self, job_id: str) -> None:
        super().remove(job_id)
        self._num_left.pop(job_id, None)
        self._open.discard(job_id)

    def num_left(self, job_id: str) -> int:
        """Prompt tokens still to be computed."""
        return self._num_left[job_id]

    def order(self, job_ids: Collection[str], now_s: float) -> list[str]:
        """Leaves out the prompts that must not begin now."""
        num_to_begin = self._max_open - len(self._open)
        order = []
        for job_id in super().order(job_ids, now_s):
            if job_id not in self._open and self._num_left[job_id] > self._chunk_tokens:
                if num_to_begin <= 0:
                    continue
                num_to_begin -= 1
            order.append(job_id)
        return order
