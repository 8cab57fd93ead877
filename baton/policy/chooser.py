"""Who serves one attempt, in order: room on a decode worker, a prefill worker, stay or go.

The whole decision of a coordinator, and of a replay: both ask here, so that what is simulated is
what is served. Room on the decode worker is found first: KV that nobody can take would fill the
prefill worker.

Two kinds of workers are no candidates: one that let this request down before, if anybody else has room for
it, and a prefill worker whose KV does not get to the decode worker (`pair_health`). Where that leaves a
decode worker without a prefill worker that can begin now, the next best decode worker is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.contract.lifecycle import Way
from baton.policy.base import Choice, RequestFacts
from baton.policy.decision import StayOrGo, way_of
from baton.policy.fleet_pace import FleetPace
from baton.policy.ledger import WorkerAccount
from baton.policy.pair_health import PairHealth
from baton.policy.room import num_blocks_wanted
from baton.policy.router import NOBODY, KnownHits, PrefillChoice, Router
from baton.policy.staying import ask, num_bytes_to_move

NEVER = "stay or go is off"
LET_DOWN = "let this request down before"
FENCED = "hand-offs between the two fail"


@dataclass(slots=True)
class Chosen:
    """What the router answered. The accounts are there without the choices where plain numbers did."""

    prefill: WorkerAccount | None = None
    """None: it is computed already, or nobody can start on it, and it stays."""
    decode: WorkerAccount | None = None
    """None: the request is over with its first token."""
    prefill_choice: PrefillChoice | None = None
    decode_choice: Choice | None = None
    is_colocated: bool = False
    """`prefill_choice` is of both phases."""
    stay_or_go: StayOrGo | None = None
    not_asked: str | None = None
    passed_over: dict[int, str] = field(default_factory=dict)
    """Slots that were no candidates although they may have had room, and why."""

    @property
    def stays(self) -> bool:
        return self.stay_or_go is not None and self.stay_or_go.costs.stays

    @property
    def computing(self) -> WorkerAccount | None:
        """Who computes the prompt."""
        return self.decode if self.stays else self.prefill

    def way(self) -> tuple[Way, str]:
        """(the way, why)"""
        return way_of(
            None if self.prefill is None else self.prefill.worker_id,
            None if self.decode is None else self.decode.worker_id,
            None if self.stay_or_go is None else self.stay_or_go.costs,
            self.not_asked,
        )

    def learn(self, router: Router, handoff_id: str, hits: KnownHits | None, now_s: float) -> None:
        """What the router should know of it; when the request has left is early enough. `now_s`: of the
        decision."""
        computing = self.computing
        if computing is None:
            return
        if self.prefill_choice is not None and not self.stays:
            router.committed(handoff_id, self.prefill_choice, hits)
        else:  # nobody ranked that worker for prefill, or plain numbers did
            router.computes(handoff_id, computing.slot, hits, now_s)


@dataclass(frozen=True, slots=True)
class Committed:
    """What a decision put on the accounts."""

    num_hit_tokens: int
    """Predicted for whoever computes the prompt."""
    num_bytes_to_move: int
    """KV that the decode worker does not hold yet."""
    is_alone: bool
    """No other prompt waits where this one is computed."""


def commit(chosen: Chosen, handoff_id: str, facts: RequestFacts, hits: KnownHits | None) -> Committed:
    """To both accounts, at once: the next decision must see this one."""
    computing, decode = chosen.computing, chosen.decode
    num_hit_tokens = num_bytes = 0
    is_alone = False
    if computing is not None:
        is_alone = not computing.num_waiting
        if hits is not None:
            num_hit_tokens = hits.tokens_by_slot.item(computing.slot)
    num_prompt_tokens = facts.num_prompt_tokens
    num_uncached = num_prompt_tokens - num_hit_tokens
    if computing is not None and computing is not decode:
        computing.commit(
            handoff_id,
            num_queued_tokens=num_uncached,
            num_blocks=computing.num_blocks_for(num_prompt_tokens),
            num_kv_tokens=num_prompt_tokens,
        )
    if decode is not None:
        num_held = 0 if hits is None else hits.tokens_by_slot.item(decode.slot)
        num_bytes = num_bytes_to_move(num_prompt_tokens - num_held, decode)
        decode.commit(
            handoff_id,
            num_queued_tokens=num_uncached if computing is decode else 0,
            num_blocks=num_blocks_wanted(facts, decode),
            num_kv_tokens=num_prompt_tokens,
        )
    return Committed(num_hit_tokens, num_bytes, is_alone)


@dataclass(slots=True)  # frozen ones take three times as long to make, and each request makes one
class _Wanted:
    facts: RequestFacts
    hits: KnownHits | None
    now_s: float
    needs_decode: bool
    is_computed: bool


class Chooser:
    def __init__(self, router: Router, pace: FleetPace | None, *, keeps_records: bool = False) -> None:
        """`pace`: what stay-or-go counts with; None: every prompt goes. `keeps_records`: every choice is
        made with a record of all that was read."""
        self._router = router
        self._pace = pace
        self._keeps_records = keeps_records
        self.pairs = PairHealth()

    def choose(
        self,
        facts: RequestFacts,
        hits: KnownHits | None,
        now_s: float,
        *,
        needs_decode: bool = True,
        is_computed: bool = False,
        unwanted: frozenset[int] = NOBODY,
    ) -> Chosen | None:
        """None: no worker has room. `is_computed`: once before, and its KV is lost; the decode worker
        computes it again. `unwanted`: slots to take only where nobody else has room."""
        wanted = _Wanted(facts, hits, now_s, needs_decode, is_computed)
        chosen = self._choose(wanted, unwanted)
        return self._choose(wanted, NOBODY) if chosen is None and unwanted else chosen

    def _choose(self, wanted: _Wanted, unwanted: frozenset[int]) -> Chosen | None:
        router = self._router
        if wanted.needs_decode and router.is_colocated:
            chosen = Chosen(is_colocated=True, passed_over=dict.fromkeys(unwanted, LET_DOWN))
            chosen.prefill_choice = router.choose_colocated(
                wanted.facts, wanted.hits, wanted.now_s, without=unwanted
            )
            if chosen.prefill_choice is None:
                return None
            chosen.decode = chosen.prefill_choice.choice.account
            chosen.prefill = None if wanted.is_computed else chosen.decode
            return chosen
        fences = self._fences(wanted.now_s) if self.pairs.has_bad else {}
        passed_over = dict.fromkeys(unwanted, LET_DOWN)
        while True:
            chosen = Chosen(passed_over=dict(passed_over))
            if wanted.needs_decode and not self._take_decode(chosen, wanted, frozenset(passed_over)):
                return None
            if wanted.is_computed:
                return chosen
            fenced = NOBODY if chosen.decode is None else fences.get(chosen.decode.slot, NOBODY)
            chosen.passed_over |= dict.fromkeys(fenced, FENCED)
            if self._take_prefill(chosen, wanted, unwanted | fenced):
                return chosen
            if chosen.decode is None or not fenced:
                return None
            passed_over[chosen.decode.slot] = FENCED

    def _fences(self, now_s: float) -> Mapping[int, frozenset[int]]:
        """Prefill workers that each decode worker gets no KV from; empty where that would leave no pair."""
        everybody = {account.slot for account in self._router.prefill_pool}
        fences = {d.slot: self.pairs.fenced_with(d.slot, now_s) for d in self._router.decode_pool}
        return fences if any(everybody - fenced for fenced in fences.values()) else {}

    def _take_decode(self, chosen: Chosen, wanted: _Wanted, without: frozenset[int]) -> bool:
        """False: nobody has room."""
        facts, hits, now_s = wanted.facts, wanted.hits, wanted.now_s
        if self._keeps_records:
            chosen.decode_choice = self._router.choose_decode(facts, hits, now_s, without)
            chosen.decode = None if chosen.decode_choice is None else chosen.decode_choice.account
        else:
            chosen.decode = self._router.place_decode(facts, now_s, hits, without)
        return chosen.decode is not None

    def _take_prefill(self, chosen: Chosen, wanted: _Wanted, without: frozenset[int]) -> bool:
        """False: nobody can start on it, and it does not stay. What a worker cannot start on yet waits in
        line, where it can still go elsewhere."""
        facts, hits, now_s = wanted.facts, wanted.hits, wanted.now_s
        if hits is None and not self._keeps_records:
            chosen.prefill = self._router.place_prefill(facts, now_s, without)
        else:
            chosen.prefill_choice = self._router.choose_prefill(facts, hits, now_s, without)
            if chosen.prefill_choice is not None:
                chosen.prefill = chosen.prefill_choice.choice.account
        if chosen.decode is not None and chosen.prefill is not chosen.decode:
            self._ask_stay_or_go(chosen, facts, hits)
        return chosen.prefill is not None or chosen.stays

    def _ask_stay_or_go(self, chosen: Chosen, facts: RequestFacts, hits: KnownHits | None) -> None:
        assert chosen.decode is not None
        if self._pace is None:
            chosen.not_asked = NEVER
            return
        # Where nobody can start on it, going means waiting at least for the shortest queue.
        prefill = chosen.prefill or min(
            self._router.prefill_pool, key=lambda account: account.num_queued_tokens, default=None
        )
        if prefill is None:
            return
        asked = ask(facts.num_prompt_tokens, hits, prefill, chosen.decode, self._pace.pace())
        if isinstance(asked, str):
            chosen.not_asked = asked
        else:
            chosen.stay_or_go = asked
