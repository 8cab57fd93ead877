"""Least attained service: whoever has received the fewest own tokens goes first.

MLFQ with infinitely fine levels. Good where sizes are heavy-tailed. With equal sizes everybody
finishes last (0.45x of FCFS in mean completion time), and requests swap places at every token, so
where memory is short it moves an order of magnitude more KV than MLFQ.
"""

from __future__ import annotations

from itertools import count

from baton.scheduling.base import JobFacts, Ranked
from baton.scheduling.first_iteration import FirstIteration


class Las(Ranked):
    name = "las"

    def __init__(self, first_iteration: FirstIteration | None = None) -> None:
        super().__init__()
        self._first_iteration = first_iteration or FirstIteration()
        self._turn = count()

    def _first_rank(self, job: JobFacts, now_s: float) -> tuple[float, ...]:
        return (job.priority, 0.0, next(self._turn))

    def charge(
        self, job_id: str, *, num_prefill_tokens: int = 0, num_output_tokens: int = 0, now_s: float
    ) -> None:
        priority, attained, turn = self._ranks[job_id]
        attained += num_output_tokens + self._first_iteration.prefill_share(num_prefill_tokens)
        self._ranks[job_id] = (priority, attained, turn)
