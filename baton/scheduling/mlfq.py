"""Multi-level feedback queue in own tokens, with skip-join: FastServe's scheduler (arXiv 2305.05920).

A request enters at the first level whose quantum covers its first iteration (skip-join), or one level
above the one where its expected length ends, and sinks a level whenever it has used up a quantum;
quanta double from level to level. Higher levels go first, inside a level who entered it first. So a
request waits only for those that have received less than it has: nobody waits behind a long one.

Differences from the published algorithm and the authors' code, and why:

* **Own tokens, not wall time.** Charging the time of a step charges everyone for its longest prompt.
* **Carry-over.** What a request used beyond its quantum counts in the next level.
* **Boost instead of promotion.** Who has not run for `starvation_s` gets `boost_tokens` now and then
  goes on in its own level. A jump to the first level hands a long request the whole ladder again,
  which costs most of the gain and, where memory is short, can go round for ever. Boosted requests
  take every second place at most.
  With S starving requests, B places and steps of t seconds nobody who fits into memory waits longer than
  `starvation_s` + t x (1 + boost_tokens x ceil(S / ceil(B / 2))).
* **Equal sizes.** Where requests are about equally long, time-slicing only makes everyone late. While
  nothing observed speaks against it (`SizeSpread`), the order is first come, first served, in which
  nobody starves either.

Does badly at the 99th percentile of raw completion time: long requests pay, about twofold.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import count

from baton.scheduling.base import JobFacts, Ranked
from baton.scheduling.first_iteration import FirstIteration
from baton.scheduling.size_spread import SizeSpread

BASE_QUANTUM_TOKENS = 4
STARVATION_S = 3.0
BOOST_TOKENS = 8


class _Account:
    __slots__ = ("attained", "depth", "level", "turn", "used")

    def __init__(self, level: int, turn: int, depth: float) -> None:
        self.level = level
        self.turn = turn
        """Order of entering the level."""
        self.used = 0.0
        """Of this level's quantum."""
        self.attained = 0.0
        self.depth = depth
        """Tokens from the top of the ladder to here."""


class Mlfq(Ranked):
    """See the module. Quanta are `base_quantum_tokens` x 2^level."""

    def __init__(
        self,
        *,
        is_skip_join: bool = True,
        base_quantum_tokens: int = BASE_QUANTUM_TOKENS,
        starvation_s: float = STARVATION_S,
        boost_tokens: int = BOOST_TOKENS,
        first_iteration: FirstIteration | None = None,
    ) -> None:
        """`starvation_s` may be infinite: no boosts. Raises ValueError for values that make no sense."""
        super().__init__()
        if base_quantum_tokens < 1 or boost_tokens < 1 or not starvation_s > 0:
            raise ValueError(
                f"quantum {base_quantum_tokens} and boost {boost_tokens} must be at least 1 token, "
                f"starvation {starvation_s:g} s above 0"
            )
        self._is_skip_join = is_skip_join
        self._base_quantum = base_quantum_tokens
        self._starvation_s = starvation_s
        self._boost_tokens = boost_tokens
        self._first_iteration = first_iteration or FirstIteration()
        self._turn = count()
        self._accounts: dict[str, _Account] = {}
        self._last_run_s: dict[str, float] = {}
        """Oldest first; boosted requests are not in it."""
        self._boosts: dict[str, float] = {}
        """Tokens left of the boost, longest waiting first."""
        self._spread = SizeSpread()

    @property
    def name(self) -> str:
        return "skip-join-mlfq" if self._is_skip_join else "mlfq"

    # ── levels ────────────────────────────────────────────────────────────────────────────────

    def quantum(self, level: int) -> int:
        return self._base_quantum << level

    def ladder(self, level: int) -> int:
        """Tokens to sink from the first level to this one."""
        return self._base_quantum * ((1 << level) - 1)

    def level(self, job_id: str) -> int:
        return self._accounts[job_id].level

    def attained(self, job_id: str) -> float:
        return self._accounts[job_id].attained

    def is_boosted(self, job_id: str) -> bool:
        return job_id in self._boosts

    def first_level(self, job: JobFacts) -> int:
        if not self._is_skip_join:
            return 0
        length = self._first_iteration.length(job.num_uncached_tokens)
        level = max(0, math.ceil(math.log2(length / self._base_quantum)))
        if job.num_expected_output_tokens is not None:
            total = length + job.num_expected_output_tokens
            # The level in which it would end, had it started at the top; one above, for the guess is one.
            ends_in = math.ceil(math.log2(total / self._base_quantum + 1)) - 1
            level = max(level, ends_in - 1)
        return level

    # ── StepPolicy ────────────────────────────────────────────────────────────────────────────

    def _first_rank(self, job: JobFacts, now_s: float) -> tuple[float, ...]:
        level = self.first_level(job)
        self._accounts[job.job_id] = _Account(level, next(self._turn), self.ladder(level))
        self._last_run_s[job.job_id] = now_s
        return self._rank(job)

    def _rank(self, job: JobFacts) -> tuple[float, ...]:
        account = self._accounts[job.job_id]
        deadline_s = math.inf if job.deadline_s is None else job.deadline_s
        return (job.priority, account.level, deadline_s, account.turn)

    def charge(
        self, job_id: str, *, num_prefill_tokens: int = 0, num_output_tokens: int = 0, now_s: float
    ) -> None:
        account = self._accounts[job_id]
        service = num_output_tokens + self._first_iteration.prefill_share(num_prefill_tokens)
        account.attained += service
        account.used += service
        self._spread.saw(account.attained)
        if account.used >= self.quantum(account.level):
            while account.used >= self.quantum(account.level):
                account.used -= self.quantum(account.level)
                account.level += 1
            account.turn = next(self._turn)
            self._ranks[job_id] = self._rank(self._jobs[job_id])
        account.depth = self.ladder(account.level) + account.used
        left = self._boosts.get(job_id)
        if left is not None and left > service:
            self._boosts[job_id] = left - service
            return
        self._boosts.pop(job_id, None)
        self._last_run_s.pop(job_id, None)
        self._last_run_s[job_id] = now_s

    def remove(self, job_id: str) -> None:
        account = self._accounts.pop(job_id, None)
        if account is None:
            return
        super().remove(job_id)
        self._last_run_s.pop(job_id, None)
        self._boosts.pop(job_id, None)
        if account.attained > 0:
            self._spread.finished(account.attained)

    def order(self, job_ids: Collection[str], now_s: float) -> list[str]:
        if self._spread.is_uniform:
            return sorted(job_ids, key=self._arrival_rank)
        self._boost_starving(now_s)
        ordered = super().order(job_ids, now_s)
        if not self._boosts:
            return ordered
        wanted = set(job_ids)
        boosted = [job_id for job_id in self._boosts if job_id in wanted]
        others = [job_id for job_id in ordered if job_id not in self._boosts]
        return _alternating(boosted, others)

    def _arrival_rank(self, job_id: str) -> tuple[float, float]:
        job = self._jobs[job_id]
        return job.priority, job.arrival_s

    def _boost_starving(self, now_s: float) -> None:
        starving = []
        for job_id, last_run_s in self._last_run_s.items():
            if now_s - last_run_s < self._starvation_s:
                break
            starving.append(job_id)
        for job_id in starving:
            del self._last_run_s[job_id]
            self._boosts[job_id] = self._boost_tokens

    def waits(self, order: list[str], *, num_places: int, step_s: float, now_s: float) -> list[float]:
        """Those ahead burn what separates them from this request's level, and none of them ends early;
        or until its boost is due, if that is sooner."""
        accounts, last_run_s = self._accounts, self._last_run_s
        depths = [accounts[job_id].depth for job_id in order]
        burnt = sum(depths[:num_places])
        # Boosted requests are not among those who wait for a boost: theirs is due.
        until_boost_s, is_due_s = self._starvation_s - now_s, now_s - self._starvation_s
        waits = [0.0] * min(num_places, len(order))
        for position in range(len(waits), len(order)):
            depth = depths[position]
            to_run = (position * (depth + 1) - burnt) / num_places
            to_boost = (last_run_s.get(order[position], is_due_s) + until_boost_s) / step_s
            soonest = to_run if to_run < to_boost else to_boost
            waits.append(soonest if soonest > 1.0 else 1.0)
            burnt += depth
        return waits


def _alternating(boosted: list[str], others: list[str]) -> list[str]:
    """Every second place, the first one included, is a boosted request's while there are any."""
    num_pairs = min(len(boosted), len(others))
    mixed = [job_id for pair in zip(boosted, others, strict=False) for job_id in pair]
    return mixed + boosted[num_pairs:] + others[num_pairs:]
