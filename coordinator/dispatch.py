"""Giving a request to workers: asks the router, commits both accounts, takes it back.

Room on the decode worker is found before prefill is dispatched: KV that nobody can take would fill
the prefill worker. A prompt is hashed once in its life, at its first look for a worker, and matched
anew at each; where no worker tells what it holds, neither happens. What the router learns from a
decision (expected prefixes, the hotspot guard's counts) is made up for before the next one, when
this one's request has left already.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.contract.lifecycle import WorkerRole
from baton.policy.base import Policy, RequestFacts
from baton.policy.ledger import WorkerAccount
from baton.policy.room import num_blocks_wanted
from baton.policy.router import KnownHits, PrefillChoice, Router
from coordinator.fleet import FleetView, Worker
from coordinator.prefixes import FleetPrefixes
from coordinator.request import Request


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who serves one attempt. At least one of the two is there; one worker may be both."""

    prefill: WorkerAccount | None
    """None: the prompt was computed before, its KV is lost; the decode worker computes it again."""
    decode: WorkerAccount | None
    """None: the request is over with its first token."""
    choice: PrefillChoice | None
    """How the worker that computes the prompt was chosen, if by more than plain numbers."""


class Dispatch:
    def __init__(
        self,
        fleet: FleetView,
        prefill_policy: Policy,
        decode_policy: Policy,
        *,
        expected_output_tokens: int,
        kv_index_bytes: int,
    ) -> None:
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
        self._unlearned: tuple[str, PrefillChoice, KnownHits] | None = None

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
        is_computed = request.prompt_token_ids is not None
        prefill: WorkerAccount | None = None
        decode: WorkerAccount | None = None
        choice: PrefillChoice | None = None
        if request.needs_decode and self._fleet.is_colocated:
            choice = self._router.choose_colocated(facts, hits, now_s)
            if choice is None:
                return None
            decode = choice.choice.account
            prefill = None if is_computed else decode
        elif request.needs_decode:
            decode = self._router.place_decode(facts, now_s, hits)
            if decode is None:
                return None
        if prefill is None and not is_computed:
            # What a worker cannot start on yet stays here, where it can still go elsewhere.
            if hits is None:
                prefill = self._router.place_prefill(facts, now_s)
            elif (choice := self._router.choose_prefill(facts, hits, now_s)) is not None:
                prefill = choice.choice.account
            if prefill is None:
                return None
        num_hit_tokens = 0
        if choice is not None and hits is not None:
            num_hit_tokens = choice.choice.hit_tokens
            self._unlearned = (handoff_id, choice, hits)
        if prefill is not None:
            request.predicted_hit_tokens = None if hits is None else num_hit_tokens
        num_uncached = facts.num_prompt_tokens - num_hit_tokens
        if prefill is not None and prefill is not decode:
            prefill.commit(
                handoff_id,
                num_queued_tokens=num_uncached,
                num_blocks=prefill.num_blocks_for(facts.num_prompt_tokens),
                num_kv_tokens=facts.num_prompt_tokens,
            )
        if decode is not None:
            decode.commit(
                handoff_id,
                num_queued_tokens=num_uncached if prefill is decode else 0,
                num_blocks=num_blocks_wanted(facts, decode),
                num_kv_tokens=facts.num_prompt_tokens,
            )
        return Assignment(prefill, decode, choice)

    def _hits(self, request: Request) -> KnownHits | None:
        # The engine computes a prompt whole whose logprobs are wanted.
        if request.prompt_token_ids is not None or request.submission.sampling.prompt_logprobs is not None:
            return None
        if request.hits is not None and self._router.is_current(request.hits):
            request.hits = self._router.refreshed(request.hits)
        else:
            request.hits = self._router.known_hits(request.submission.prompt_token_ids)
        return request.hits

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
        if self._unlearned is not None:
            handoff_id, choice, hits = self._unlearned
            self._unlearned = None
            self._router.committed(handoff_id, choice, hits)
