"""Giving a request to workers: asks the router, commits both accounts, takes it back.

Room on the decode worker is found before prefill is dispatched: KV that nobody can take would fill
the prefill worker. A prompt is hashed once in its life, at its first look for a worker, and matched
anew at each; where no worker tells what it holds, neither happens. What the router learns from a
decision (expected prefixes, the hotspot guard's counts) is made up for before the next one, when
this one's request has left already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from baton.contract.lifecycle import Way, WorkerRole
from baton.policy.base import Choice, Policy, RequestFacts
from baton.policy.decision import Decision, StayOrGo, way_of
from baton.policy.explain import read_all, record_decision
from baton.policy.ledger import Pool, WorkerAccount
from baton.policy.room import lack_of_prefill_room, lack_of_room, num_blocks_wanted
from baton.policy.router import KnownHits, PrefillChoice, Router, best_hit_tokens
from baton.policy.stay_or_go import Pace
from coordinator.deadline import least_output_tokens, service_s
from coordinator.fleet import FleetView, Worker
from coordinator.fleet_pace import FleetPace
from coordinator.prefixes import FleetPrefixes
from coordinator.request import Request
from coordinator.staying import ask, num_bytes_to_move


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


@dataclass(slots=True)
class _Chosen:
    """What the router answered. The accounts are there without the choices where plain numbers did."""

    prefill: WorkerAccount | None = None
    decode: WorkerAccount | None = None
    prefill_choice: PrefillChoice | None = None
    decode_choice: Choice | None = None
    is_colocated: bool = False
    """`prefill_choice` is of both phases."""
    stay_or_go: StayOrGo | None = None
    not_asked: str | None = None


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What the router learns from a decision once its request has left."""

    handoff_id: str
    slot: int
    """Of the worker that computes the prompt."""
    choice: PrefillChoice | None
    """None: nobody chose that worker for prefill, the prompt stays where it is decoded."""
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
        self._keeps_records = keeps_records
        self._unlearned: _Lesson | None = None

    # ── workers ──────────────────────────────────────────────────────────────────────────────

    def worker_joined(self, worker: Worker) -> None:
        self.prefixes.worker_joined(worker)

    def worker_left(self, worker: Worker) -> None:
        self._learn()
        self.prefixes.worker_left(worker)

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def assign(self, request: Request, handoff_id: str, now_s: float) -> Assignment | None:
        """Commits the request to workers as attempt `handoff_id`. None: no worker has room; nothing
        changed."""
        self._learn()
        self.prefixes.settle_due(now_s)
        facts = RequestFacts(
            num_prompt_tokens=request.num_prompt_tokens,
            num_expected_output_tokens=min(
                request.submission.sampling.max_tokens, self._expected_output_tokens
            ),
        )
        hits = self._hits(request)
        chosen = self._choose(request, facts, hits, now_s)
        if chosen is None:
            return None
        prefill, decode = chosen.prefill, chosen.decode
        way, reason = way_of(
            None if prefill is None else prefill.worker_id,
            None if decode is None else decode.worker_id,
            None if chosen.stay_or_go is None else chosen.stay_or_go.costs,
            chosen.not_asked,
        )
        record = self._record(handoff_id, chosen, facts) if self._keeps_records else None
        if way is Way.STAYED:
            prefill = decode
        self._commit(request, handoff_id, facts, hits, prefill, decode)
        choice = None if way is Way.STAYED else chosen.prefill_choice
        if prefill is not None and (choice is not None or hits is not None):
            self._unlearned = _Lesson(handoff_id, prefill.slot, choice, hits, now_s)
        return Assignment(prefill, decode, way, reason, record)

    def _choose(
        self, request: Request, facts: RequestFacts, hits: KnownHits | None, now_s: float
    ) -> _Chosen | None:
        router, chosen = self._router, _Chosen()
        is_computed = request.prompt_token_ids is not None
        if request.needs_decode and self._fleet.is_colocated:
            chosen.prefill_choice = router.choose_colocated(facts, hits, now_s)
            if chosen.prefill_choice is None:
                return None
            chosen.is_colocated = True
            chosen.decode = chosen.prefill_choice.choice.account
            chosen.prefill = None if is_computed else chosen.decode
            return chosen
        if request.needs_decode:
            if self._keeps_records:
                chosen.decode_choice = router.choose_decode(facts, hits, now_s)
                chosen.decode = None if chosen.decode_choice is None else chosen.decode_choice.account
            else:
                chosen.decode = router.place_decode(facts, now_s, hits)
            if chosen.decode is None:
                return None
        if is_computed:
            return chosen
        # What a worker cannot start on yet stays here, where it can still go elsewhere.
        if hits is None and not self._keeps_records:
            chosen.prefill = router.place_prefill(facts, now_s)
        else:
            chosen.prefill_choice = router.choose_prefill(facts, hits, now_s)
            if chosen.prefill_choice is not None:
                chosen.prefill = chosen.prefill_choice.choice.account
        if chosen.decode is not None and chosen.prefill is not chosen.decode:
            self._ask_stay_or_go(chosen, facts, hits)
        is_stay = chosen.stay_or_go is not None and chosen.stay_or_go.costs.stays
        return chosen if chosen.prefill is not None or is_stay else None

    def _ask_stay_or_go(self, chosen: _Chosen, facts: RequestFacts, hits: KnownHits | None) -> None:
        assert chosen.decode is not None
        # Where nobody can start on it, going means waiting at least for the shortest queue.
        prefill = chosen.prefill or min(
            self._fleet.accounts(WorkerRole.PREFILL),
            key=lambda account: account.num_queued_tokens,
            default=None,
        )
        if prefill is None:
            return
        asked = ask(facts.num_prompt_tokens, hits, prefill, chosen.decode, self.pace.pace())
        if isinstance(asked, str):
            chosen.not_asked = asked
        else:
            chosen.stay_or_go = asked

    def _commit(
        self,
        request: Request,
        handoff_id: str,
        facts: RequestFacts,
        hits: KnownHits | None,
        prefill: WorkerAccount | None,
        decode: WorkerAccount | None,
    ) -> None:
        num_hit_tokens = 0
        if hits is not None and prefill is not None:
            num_hit_tokens = hits.tokens_by_slot.item(prefill.slot)
        if prefill is not None:
            is_known = hits is not None and self.prefixes.is_told_by(prefill.worker_id)
            request.predicted_hit_tokens = num_hit_tokens if is_known else None
            request.is_alone = not prefill.num_waiting
        num_uncached = facts.num_prompt_tokens - num_hit_tokens
        if prefill is not None and prefill is not decode:
            prefill.commit(
                handoff_id,
                num_queued_tokens=num_uncached,
                num_blocks=prefill.num_blocks_for(facts.num_prompt_tokens),
                num_kv_tokens=facts.num_prompt_tokens,
            )
        if decode is not None:
            num_held = 0 if hits is None else hits.tokens_by_slot.item(decode.slot)
            request.num_bytes_to_move = num_bytes_to_move(facts.num_prompt_tokens - num_held, decode)
            decode.commit(
                handoff_id,
                num_queued_tokens=num_uncached if prefill is decode else 0,
                num_blocks=num_blocks_wanted(facts, decode),
                num_kv_tokens=facts.num_prompt_tokens,
            )

    def _record(self, handoff_id: str, chosen: _Chosen, facts: RequestFacts) -> dict[str, Any]:
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
                self._fleet.accounts(WorkerRole.DECODE), chosen.decode_choice, partial(lack_of_room, facts)
            )
        if prefill is not None and not chosen.is_colocated:
            left_out |= _left_out(
                self._fleet.accounts(WorkerRole.PREFILL), prefill.unguarded, lack_of_prefill_room
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
        if request.prompt_token_ids is not None or request.submission.sampling.prompt_logprobs is not None:
            return None
        if request.hits is not None and self._router.is_current(request.hits):
            request.hits = self._router.refreshed(request.hits)
        else:
            request.hits = self._router.known_hits(request.submission.prompt_token_ids)
        return request.hits

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
        if lesson.choice is None:
            self._router.computes(lesson.handoff_id, lesson.slot, lesson.hits, lesson.now_s)
        else:
            self._router.committed(lesson.handoff_id, lesson.choice, lesson.hits)


def _left_out(pool: Pool, choice: Choice, why: Callable[[WorkerAccount], str]) -> dict[str, str]:
    able = set(choice.candidates.slots.tolist())
    return {account.worker_id: why(account) for account in pool if account.slot not in able}
