"""What a step policy is told, and what it answers.

An engine step has a limited number of places (sequences, tokens, KV blocks). Before each step the
engine asks for the order of everything that could run, gives places from the front until they are
taken, and afterwards tells what each request that ran has received. A request that is not in the
front keeps what it has: how (parked with its KV, swapped, recomputed) is the engine's business, and
`swap.SwapRule` decides who leaves memory.

    policy.add(JobFacts(job_id="a", arrival_s=0.0), now_s=0.0)
    while jobs:
        for job_id in policy.order(jobs, now_s)[:num_places]: run it
        for job_id in those: policy.charge(job_id, num_output_tokens=1, now_s=now_s)
        for job_id in finished: policy.remove(job_id)

All policies measure service in the request's own tokens, never in wall time: a step also contains
other requests' work (a long prompt, say), and who is charged for that sinks for no fault of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What is known of a request when it reaches an engine."""

    job_id: str
    arrival_s: float
    """On the same clock as every `now_s`; only differences count."""
    num_uncached_tokens: int = 0
    """Prompt tokens to be computed here. On a decode worker that gets its KV: about none. Prefix hits
    are taken off: by raw prompt length the next turn of a long chat would be taken for a long job."""
    num_expected_output_tokens: int | None = None
    """Declared or predicted. A prior, never the truth: whoever outlives it sinks like anyone else."""
    num_output_tokens: int | None = None
    """The truth, for the oracle in simulations."""
    priority: int = 0
    """Smaller is served first, among requests of one key. As in vLLM."""
    key: str = ""
    """Tenant or session that is charged for the service."""
    deadline_s: float | None = None
    """On the clock of `arrival_s`. Inside a level, earlier deadlines go first while they can be met."""


class StepPolicy(Protocol):
    """Orders requests. Owns its own account of each; O(n log n) in the requests it is asked about."""

    @property
    def name(self) -> str:
        """As `registry.by_name` takes it."""

    def add(self, job: JobFacts, now_s: float) -> None:
        """A request came, or a session came back with a new turn. Its id must not be present."""

    def charge(
        self, job_id: str, *, num_prefill_tokens: int = 0, num_output_tokens: int = 0, now_s: float
    ) -> None:
        """It ran: so many of its prompt tokens were computed, so many tokens were delivered."""

    def remove(self, job_id: str) -> None:
        """Finished or aborted. Unknown ids are ignored: an engine may tell twice."""

    def order(self, job_ids: Collection[str], now_s: float) -> list[str]:
        """Best first. Ids that must not run now may be missing from the answer."""

    def waits(self, order: list[str], *, num_places: int, step_s: float, now_s: float) -> list[float]:
        """For each of `order`: the estimated number of steps until it runs (FastServe's ENST), 0 for
        those that run now. `step_s` is about how long a step takes."""


class Ranked(ABC):
    """Policies whose order is a sort by one key per request, kept up to date on every charge."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobFacts] = {}
        self._ranks: dict[str, tuple[float, ...]] = {}

    def add(self, job: JobFacts, now_s: float) -> None:
        if job.job_id in self._jobs:
            raise ValueError(f"job {job.job_id} is already here")
        self._jobs[job.job_id] = job
        self._ranks[job.job_id] = self._first_rank(job, now_s)

    @abstractmethod
    def _first_rank(self, job: JobFacts, now_s: float) -> tuple[float, ...]:
        """Smaller goes first; what a policy knows of a request when it comes."""

    @abstractmethod
    def charge(
        self, job_id: str, *, num_prefill_tokens: int = 0, num_output_tokens: int = 0, now_s: float
    ) -> None:
        """Changes the rank by the service, if that counts."""

    def remove(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)
        self._ranks.pop(job_id, None)

    def order(self, job_ids: Collection[str], now_s: float) -> list[str]:
        return sorted(job_ids, key=self._ranks.__getitem__)

    def waits(self, order: list[str], *, num_places: int, step_s: float, now_s: float) -> list[float]:
        """Nothing is known but the place in the queue."""
        return [float(max(0, position - num_places + 1)) for position in range(len(order))]
