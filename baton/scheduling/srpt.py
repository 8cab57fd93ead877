"""Shortest remaining processing time, with the true output length: an oracle for simulations.

No policy can do much better on mean completion time, so it tells how much there is to gain.
"""

from __future__ import annotations

from itertools import count

from baton.scheduling.base import JobFacts, Ranked
from baton.scheduling.first_iteration import FirstIteration


class Srpt(Ranked):
    name = "srpt"

    def __init__(self, first_iteration: FirstIteration | None = None) -> None:
        super().__init__()
        self._first_iteration = first_iteration or FirstIteration()
        self._turn = count()

    def _first_rank(self, job: JobFacts, now_s: float) -> tuple[float, ...]:
        if job.num_output_tokens is None:
            raise ValueError(f"srpt needs the true output length of {job.job_id}, which nobody knows")
        remaining = job.num_output_tokens + self._first_iteration.prefill_share(job.num_uncached_tokens)
        return (remaining, next(self._turn))

    def charge(
        self, job_id: str, *, num_prefill_tokens: int = 0, num_output_tokens: int = 0, now_s: float
    ) -> None:
        remaining, turn = self._ranks[job_id]
        received = num_output_tokens + self._first_iteration.prefill_share(num_prefill_tokens)
        self._ranks[job_id] = (remaining - received, turn)
