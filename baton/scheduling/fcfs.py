"""First come, first served: what vLLM does, and the yardstick.

Optimal when everybody fits into one step, and when all requests are equally long. Does badly when a
few long ones hold all places: everyone behind them waits for their end.
"""

from __future__ import annotations

from itertools import count

from baton.scheduling.base import JobFacts, Ranked


class Fcfs(Ranked):
    name = "fcfs"

    def __init__(self) -> None:
        super().__init__()
        self._turn = count()

    def _first_rank(self, job: JobFacts, now_s: float) -> tuple[float, ...]:
        return (job.priority, next(self._turn))

    def charge(
        self, job_id: str, *, num_prefill_tokens: int = 0, num_output_tokens: int = 0, now_s: float
    ) -> None:
        """Service does not count."""
