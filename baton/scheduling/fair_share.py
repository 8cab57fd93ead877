"""Service charged per key, so that nobody takes everything by sending more requests.

Wraps any policy. Each key (tenant, session) has a counter of the service its requests received; places
go to the key with the smallest counter, a place given in this step counting as `quantum_tokens`, and
inside a key in the wrapped policy's order. It is VTC (OSDI'24) around a preemptive policy. With one key
present the order is the wrapped one's.

Keys with equal counters share a step's places equally; who is behind by that many quanta gets all
of them, so between keys that have enough to do service never differs by more than
`quantum_tokens` x places + what one step gives. A key that was away starts at the smallest counter of
those present: unused service is not saved up.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping

from baton.scheduling.base import JobFacts, StepPolicy

QUANTUM_TOKENS = 8
_MAX_ABSENT_KEYS = 1024


class FairShare:
    def __init__(
        self,
        policy: StepPolicy,
        *,
        quantum_tokens: int = QUANTUM_TOKENS,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`weights`: share of a key, 1 where absent."""
        if quantum_tokens < 1 or any(weight <= 0 for weight in (weights or {}).values()):
            raise ValueError(f"quantum {quantum_tokens} must be at least 1 token, weights above 0")
        self.policy = policy
        self._quantum = quantum_tokens
        self._weights = dict(weights or {})
        self._key_by_job: dict[str, str] = {}
        self._num_jobs: dict[str, int] = {}
        """Of keys that have any."""
        self._served: dict[str, float] = {}

    @property
    def name(self) -> str:
        return self.policy.name

    def served(self, key: str) -> float:
        """Weighted tokens on the key's counter."""
        return self._served.get(key, 0.0)

    def add(self, job: JobFacts, now_s: float) -> None:
        self.policy.add(job, now_s)
        self._key_by_job[job.job_id] = job.key
        if job.key not in self._num_jobs:
            floor = min((self._served[key] for key in self._num_jobs), default=0.0)
            self._served[job.key] = max(self._served.get(job.key, 0.0), floor)
        self._num_jobs[job.key] = self._num_jobs.get(job.key, 0) + 1

    def charge(
        self, job_id: str, *, num_prefill_tokens: int = 0, num_output_tokens: int = 0, now_s: float
    ) -> None:
        key = self._key_by_job[job_id]
        self._served[key] += (num_prefill_tokens + num_output_tokens) / self._weights.get(key, 1.0)
        self.policy.charge(
            job_id, num_prefill_tokens=num_prefill_tokens, num_output_tokens=num_output_tokens, now_s=now_s
        )

    def remove(self, job_id: str) -> None:
        self.policy.remove(job_id)
        key = self._key_by_job.pop(job_id, None)
        if key is None:
            return
        self._num_jobs[key] -= 1
        if not self._num_jobs[key]:
            del self._num_jobs[key]
            self._forget_absent_keys()

    def _forget_absent_keys(self) -> None:
        """A counter matters to an absent key only while it is above everyone's who is present."""
        if not self._num_jobs:
            self._served.clear()
        elif len(self._served) > len(self._num_jobs) + _MAX_ABSENT_KEYS:
            floor = min(self._served[key] for key in self._num_jobs)
            self._served = {
                key: served for key, served in self._served.items() if key in self._num_jobs or served > floor
            }

    def order(self, job_ids: Collection[str], now_s: float) -> list[str]:
        order = self.policy.order(job_ids, now_s)
        if len(self._num_jobs) < 2:
            return order
        by_key: dict[str, list[str]] = {}
        for job_id in order:
            by_key.setdefault(self._key_by_job[job_id], []).append(job_id)
        # (counter in quanta and places given, turn), smallest first.
        heap = [(self._served[key] / self._quantum, turn, key) for turn, key in enumerate(sorted(by_key))]
        heapq.heapify(heap)
        taken = dict.fromkeys(by_key, 0)
        merged: list[str] = []
        while heap:
            score, turn, key = heap[0]
            jobs = by_key[key]
            merged.append(jobs[taken[key]])
            taken[key] += 1
            if taken[key] == len(jobs):
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (score + 1.0 / self._weights.get(key, 1.0), turn, key))
        return merged

    def waits(self, order: list[str], *, num_places: int, step_s: float, now_s: float) -> list[float]:
        return self.policy.waits(order, num_places=num_places, step_s=step_s, now_s=now_s)
