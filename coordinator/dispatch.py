"""Giving a request to workers: asks who (`baton.policy.chooser`), commits both accounts, takes it back.

A prompt is hashed once in its life, at its first look for a worker, and matched
anew at each; where no worker tells what it holds, neither happens. What the router learns from a
decision (expected prefixes, the hotspot guard's counts) is made up for before the next one, when
this one's request has left already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from baton.contract.lifecycle import Way, WorkerRole
from baton.policy.base import Choice, Policy, RequestFacts
from baton.policy.chooser import Chooser, Chosen, commit
from baton.policy.decision import Decision
from baton.policy.explain import read_all, record_decision
from baton.policy.fleet_pace import FleetPace
from baton.policy.ledger import Pool, WorkerAccount
from baton.policy.pair_health import FENCE_S, PairHealth
from baton.policy.room import lack_of_prefill_room, lack_of_room
from baton.policy.router import NOBODY, KnownHits, Router, best_hit_tokens
from baton.policy.stay_or_go import Pace
from baton.telemetry import event
from coordinator.deadline import least_output_tokens, service_s
from coordinator.fleet import FleetView, Worker
from coordinator.prefixes import FleetPrefixes
from coordinator.request import Request

logger = logging.getLogger("baton.coordinator")


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who serves one attempt. At least one of the two is there; one worker may be both."""

    prefill: WorkerAccount | None
    """None: the prompt was computed before, its KV is lost; the decode worker computes it again."""
    decode: WorkerAccount | None
    """None: the request is over with its first token."""
    way: Way
    reason: str
    record: dict[str, Any] | None
    """Every fact of the decision, where decisions are recorded."""


@dataclass(frozen=True, slots=True)
class BadPair:
    """Whose last hand-off failed."""

    prefill_worker: str
    decode_worker: str
    num_failures: int
    """In a row."""
    fenced_s: float
    """For so long from now on; 0: not, or due for a trial."""


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What the router learns from a decision once its request has left."""

    handoff_id: str
    chosen: Chosen
    hits: KnownHits | None
    now_s: float


class Dispatch:
    def __init__(
        self,
        fleet: FleetView,
        prefill_policy: Policy,
        decode_policy: Policy,
        *,
        expected_output_tokens: int,
        kv_index_bytes: int,
        keeps_records: bool = False,
        pace: Pace | None = None,
    ) -> None:
        """`keeps_records`: every choice is made with a record of all that was read. `pace`: instead of
        learning it."""
        self._fleet = fleet
        self._expected_output_tokens = expected_output_tokens
        self._router = Router(
            fleet.ledger,
            fleet.accounts(WorkerRole.PREFILL),
            fleet.accounts(WorkerRole.DECODE),
            fleet.colocated,
            prefill_policy=prefill_policy,
            decode_policy=decode_policy,
        )
        self.prefixes = FleetPrefixes(self._router, max_bytes=kv_index_bytes)
        self.pace = FleetPace(pace)
        self._chooser = Chooser(self._router, self.pace, keeps_records=keeps_records)
        self._keeps_records = keeps_records
        self._unlearned: _Lesson | None = None

    # ── workers ──────────────────────────────────────────────────────────────────────────────

    def worker_joined(self, worker: Worker) -> None:
        self.prefixes.worker_joined(worker)

    def worker_left(self, worker: Worker) -> None:
        self._learn()
        self.pairs.left(worker.account.slot)
        self.prefixes.worker_left(worker)

    # ── pairs ────────────────────────────────────────────────────────────────────────────────

    @property
    def pairs(self) -> PairHealth:
        return self._chooser.pairs

    def bad_pairs(self, now_s: float) -> Iterator[BadPair]:
        ledger = self._fleet.ledger
        for pair in self.pairs:
            prefill, decode = ledger.account(pair.prefill), ledger.account(pair.decode)
            left_s = max(0.0, pair.fenced_until_s - now_s)
            yield BadPair(prefill.worker_id, decode.worker_id, pair.num_failures, left_s)

    def handoff_failed(self, prefill_id: str, decode_id: str, now_s: float) -> None:
        prefill, decode = self._fleet.get(prefill_id), self._fleet.get(decode_id)
        if prefill is None or decode is None:
            return
        pair = self.pairs.failed(prefill.account.slot, decode.account.slot, now_s)
        if pair.is_bad:
            event(logger, "pair fenced", level=logging.WARNING, prefill_worker=prefill_id,
                  decode_worker=decode_id, num_failures=pair.num_failures, fence_s=FENCE_S)  # fmt: skip

    def handoff_succeeded(self, prefill_id: str, decode_id: str) -> None:
        prefill, decode = self._fleet.get(prefill_id), self._fleet.get(decode_id)
        if prefill is not None and decode is not None:
            self.pairs.succeeded(prefill.account.slot, decode.account.slot)

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def assign(self, request: Request, handoff_id: str, now_s: float) -> Assignment | None:
        """Commits the request to workers as attempt `handoff_id`. None: no worker has room; nothing
        changed."""
        self._learn()
        self.prefixes.settle_due(now_s)
        facts = RequestFacts(
            num_prompt_tokens=request.num_context_tokens,
            num_expected_output_tokens=min(request.num_tokens_left, self._expected_output_tokens),
        )
        hits = self._hits(request)
        chosen = self._chooser.choose(
            facts,
            hits,
            now_s,
            needs_decode=request.needs_decode,
            is_computed=request.is_recomputed,
            unwanted=self._slots(request.unwanted_workers) if request.unwanted_workers else NOBODY,
        )
        if chosen is None:
            return None
        way, reason = chosen.way()
        record = self._record(handoff_id, chosen, facts) if self._keeps_records else None
        self._commit(request, handoff_id, chosen, facts, hits)
        if self.pairs.has_bad and chosen.computing is not None and chosen.decode is not None:
            self.pairs.chosen(chosen.computing.slot, chosen.decode.slot, now_s)
        self._unlearned = _Lesson(handoff_id, chosen, hits, now_s)
        return Assignment(chosen.computing, chosen.decode, way, reason, record)

    def _commit(
        self,
        request: Request,
        handoff_id: str,
        chosen: Chosen,
        facts: RequestFacts,
        hits: KnownHits | None,
    ) -> None:
        computing = chosen.computing
        committed = commit(chosen, handoff_id, facts, hits)
        if computing is not None:
            if not request.num_output_tokens:
                is_known = hits is not None and self.prefixes.is_told_by(computing.worker_id)
                request.predicted_hit_tokens = committed.num_hit_tokens if is_known else None
            request.is_alone = committed.is_alone
        request.num_bytes_to_move = committed.num_bytes_to_move

    def _record(self, handoff_id: str, chosen: Chosen, facts: RequestFacts) -> dict[str, Any]:
        """Before anything is committed: facts that nobody has read yet are read now."""
        prefill = chosen.prefill_choice
        choices = [chosen.decode_choice]
        left_out: dict[str, str] = {}
        if prefill is not None:
            choices += [prefill.choice, prefill.unguarded]
        for choice in choices:
            if choice is not None:
                read_all(choice.candidates)
        if chosen.decode_choice is not None:
            left_out |= _left_out(
                self._fleet.accounts(WorkerRole.DECODE),
                chosen.decode_choice,
                chosen.passed_over,
                partial(lack_of_room, facts),
            )
        if prefill is not None and not chosen.is_colocated:
            left_out |= _left_out(
                self._fleet.accounts(WorkerRole.PREFILL),
                prefill.unguarded,
                chosen.passed_over,
                lack_of_prefill_room,
            )
        decision = Decision(
            handoff_id=handoff_id,
            prefill=None if chosen.is_colocated else prefill,
            decode=chosen.decode_choice,
            colocated=prefill if chosen.is_colocated else None,
            is_recomputed=chosen.is_colocated and chosen.prefill is None,
            stay_or_go=chosen.stay_or_go,
            not_asked=chosen.not_asked,
            left_out=left_out,
        )
        return record_decision(decision, lambda slot: self._fleet.ledger.account(slot).worker_id)

    def _hits(self, request: Request) -> KnownHits | None:
        # The engine computes a prompt whole whose logprobs are wanted.
        if request.is_recomputed or request.wants_prompt_logprobs:
            return None
        if request.hits is not None and self._router.is_current(request.hits):
            request.hits = self._router.refreshed(request.hits)
        else:
            request.hits = self._router.known_hits(request.context())
        return request.hits

    def _slots(self, worker_ids: Iterable[str]) -> frozenset[int]:
        """Of those that are there."""
        workers = map(self._fleet.get, worker_ids)
        return frozenset(worker.account.slot for worker in workers if worker is not None)

    def least_service_s(self, request: Request) -> float:
        """From leaving the line to the last token, at the least, as far as the fleet's pace is known."""
        hits = self._hits(request)
        return service_s(
            request.num_prompt_tokens,
            0 if hits is None else best_hit_tokens(hits),
            least_output_tokens(request.submission.sampling),
            self._fleet.accounts(WorkerRole.PREFILL),
            self._fleet.accounts(WorkerRole.DECODE),
            self.pace.least(),
        )

    def prompt_computed(self, worker: Worker, handoff_id: str, now_s: float) -> None:
        """The leg itself and its blocks stay until `release`."""
        self._learn()
        worker.account.prefill_done(handoff_id)
        self.prefixes.prompt_computed(handoff_id, now_s)

    def prompt_given_up(self, handoff_id: str) -> None:
        """The attempt is over, and whether its prompt was ever computed is not known."""
        self._learn()
        self._router.leg_ended(handoff_id)

    def release(self, worker_id: str, handoff_id: str) -> None:
        """What was committed to a worker; again, or for one that is gone, it does nothing."""
        worker = self._fleet.get(worker_id)
        if worker is not None:
            worker.account.release(handoff_id)

    def _learn(self) -> None:
        lesson = self._unlearned
        if lesson is None:
            return
        self._unlearned = None
        lesson.chosen.learn(self._router, lesson.handoff_id, lesson.hits, lesson.now_s)


def _left_out(
    pool: Pool, choice: Choice, passed_over: Mapping[int, str], why: Callable[[WorkerAccount], str]
) -> dict[str, str]:
    able = set(choice.candidates.slots.tolist())
    return {
        account.worker_id: passed_over.get(account.slot) or why(account)
        for account in pool
        if account.slot not in able
    }
