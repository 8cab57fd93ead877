"""Both choices for one request, from its tokens: hash, match, score, guard; then room and batch.

Owns no accounts and sends nothing. The caller commits what it decides (`Ledger`), tells the router
(`committed`) once the request is on its way, and again when a leg's prefill ends (`prefill_done`),
so that everything not needed to decide happens after the request has left.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from baton.policy.base import Candidates, Choice, Policy, RanksOne, RequestFacts, choose
from baton.policy.expectations import Expectations
from baton.policy.hotspot import HotspotGuard, without_holders
from baton.policy.kv_index import KvIndex
from baton.policy.ledger import Ledger, Pool, Vector, WorkerAccount
from baton.policy.lmetric import LMetric
from baton.policy.prefix_hash import PromptHashes
from baton.policy.room import has_room, slots_with_prefill_room, slots_with_room

NOBODY: frozenset[int] = frozenset()
"""Of ledger slots."""

FEW = 16
"""Workers of a phase up to which they are ranked one by one, where the policy can."""


@dataclass(slots=True)
class KnownHits:
    """What the fleet holds of one prompt, as hit tokens per ledger slot."""

    prompt: PromptHashes
    tokens_by_slot: Vector


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    policy: Policy
    choice: Choice
    unguarded: Choice
    """What the score alone says; the same object unless the guard took its favourites out."""

    @property
    def is_diverted(self) -> bool:
        return self.choice is not self.unguarded


class Router:
    def __init__(
        self,
        ledger: Ledger,
        prefill_pool: Pool,
        decode_pool: Pool,
        colocated_pool: Pool | None = None,
        *,
        prefill_policy: Policy,
        decode_policy: Policy,
        colocated_policy: Policy | None = None,
        index: KvIndex | None = None,
        expectations: Expectations | None = None,
        guard: HotspotGuard | None = None,
        seed: int = 0,
    ) -> None:
        """Without an index no hits are predicted. The same seed and the same calls give the same
        choices. `colocated_pool`: workers that serve both phases; they are in the pool of each phase too."""
        self._ledger = ledger
        self._prefill_pool = prefill_pool
        self._decode_pool = decode_pool
        self._colocated_pool = Pool() if colocated_pool is None else colocated_pool
        self._colocated_policy = colocated_policy or LMetric()
        self._prefill_policy = prefill_policy
        self._decode_policy = decode_policy
        self._index = index
        self._expectations = expectations
        self._guard = guard
        self._draw = random.Random(seed).getrandbits
        self._ranks_prefill = prefill_policy if isinstance(prefill_policy, RanksOne) else None
        self._ranks_decode = decode_policy if isinstance(decode_policy, RanksOne) else None

    @property
    def prefill_pool(self) -> Pool:
        return self._prefill_pool

    @property
    def decode_pool(self) -> Pool:
        return self._decode_pool

    @property
    def is_colocated(self) -> bool:
        """There are only workers that serve both phases: no request is ever handed off."""
        return len(self._prefill_pool) == len(self._decode_pool) == len(self._colocated_pool)

    def know(
        self,
        index: KvIndex | None,
        expectations: Expectations | None = None,
        guard: HotspotGuard | None = None,
    ) -> None:
        """What there is to know of prefixes from now on; hits that were asked for before are void."""
        self._index, self._expectations, self._guard = index, expectations, guard

    def known_hits(self, packed: bytes, namespace: str = "") -> KnownHits | None:
        """One match for all workers of both roles; None without an index. Good until the next event:
        ask again for each attempt, the hashes are kept with `prompt`."""
        return None if self._index is None else self._hits(self._index.prompt(packed, namespace), self._index)

    def is_current(self, hits: KnownHits) -> bool:
        """Whether they can be refreshed: their index is still the one in use."""
        return self._index is not None and hits.prompt.hasher is self._index.hasher

    def refreshed(self, hits: KnownHits) -> KnownHits:
        """The same prompt against the index of now, without hashing again."""
        assert self._index is not None
        return self._hits(hits.prompt, self._index)

    def _hits(self, prompt: PromptHashes, index: KvIndex) -> KnownHits:
        blocks = index.blocks_by_slot(index.match(prompt), self._ledger.num_slots)
        if self._expectations is not None:
            for slot, depth in self._expectations.match(prompt):
                if depth > blocks[slot]:
                    blocks[slot] = depth
        blocks *= index.hasher.block_size_tokens
        return KnownHits(prompt, blocks)

    def choose_prefill(
        self, facts: RequestFacts, hits: KnownHits | None, now_s: float, without: frozenset[int] = NOBODY
    ) -> PrefillChoice | None:
        """None: the pool is empty, or this prompt fits nobody's window. `without`: slots of workers that are
        no candidates, here and below."""
        slots = _less(self._startable(facts, hits, self._prefill_pool), without)
        return self._choose(self._prefill_policy, self._candidates(facts, slots, hits, now_s), hits)

    def _startable(self, facts: RequestFacts, hits: KnownHits | None, pool: Pool) -> Vector:
        return slots_with_prefill_room(
            facts, self._ledger, pool, None if hits is None else hits.tokens_by_slot
        )

    def _choose(self, policy: Policy, candidates: Candidates, hits: KnownHits | None) -> PrefillChoice | None:
        choice = choose(policy, candidates)
        if choice is None:
            return None
        if self._guard is not None and self._guard.is_acting and hits is not None and len(candidates) > 1:
            diverted = self._divert(policy, hits, candidates)
            if diverted is not None:
                return PrefillChoice(policy, diverted, choice)
        return PrefillChoice(policy, choice, choice)

    def _divert(self, policy: Policy, hits: KnownHits, candidates: Candidates) -> Choice | None:
        assert self._guard is not None and self._index is not None
        block_size = self._index.hasher.block_size_tokens
        depth = self._guard.excludes(hits.prompt, candidates, block_size)
        if depth is None:
            return None
        others = without_holders(candidates, depth * block_size)
        if not len(others):
            return None
        slots = candidates.slots[others]
        return choose(
            policy, self._candidates(candidates.facts, slots, hits, candidates.now_s, candidates.draw)
        )

    def choose_decode(
        self, facts: RequestFacts, hits: KnownHits | None, now_s: float, without: frozenset[int] = NOBODY
    ) -> Choice | None:
        """None: nobody has room."""
        slots = slots_with_room(facts, self._ledger, _less(self._decode_pool.slots, without))
        return choose(self._decode_policy, self._candidates(facts, slots, hits, now_s))

    def choose_colocated(
        self, facts: RequestFacts, hits: KnownHits | None, now_s: float, without: frozenset[int] = NOBODY
    ) -> PrefillChoice | None:
        """One worker for both phases, unless told otherwise by the product, which was made for this:
        decodes running there count in its batch. None: nobody has room for both."""
        slots = _less(self._startable(facts, hits, self._colocated_pool), without)
        slots = slots_with_room(facts, self._ledger, slots)
        return self._choose(self._colocated_policy, self._candidates(facts, slots, hits, now_s), hits)

    def _candidates(
        self,
        facts: RequestFacts,
        slots: Vector,
        hits: KnownHits | None,
        now_s: float,
        draw: int | None = None,
    ) -> Candidates:
        hit_tokens = None if hits is None else hits.tokens_by_slot.take(slots)
        draw = self._draw(48) if draw is None else draw
        return Candidates(facts, self._ledger, slots, hit_tokens=hit_tokens, draw=draw, now_s=now_s)

    # ── without a record, few workers ────────────────────────────────────────────────────────

    def place_prefill(
        self, facts: RequestFacts, now_s: float, without: frozenset[int] = NOBODY
    ) -> WorkerAccount | None:
        """As `choose_prefill` and `committed` where nothing is known of hits, and without a record.
        Whoever gets an answer uses it: the policy remembers it already."""
        if self._ranks_prefill is not None and len(self._prefill_pool) <= FEW:
            num_tokens = facts.num_prompt_tokens
            startable = [
                a for a in self._prefill_pool if a.has_prefill_room(num_tokens) and a.slot not in without
            ]
            return self._best(self._ranks_prefill, startable, facts, None)
        choice = self.choose_prefill(facts, None, now_s, without)
        if choice is None:
            return None
        self._prefill_policy.committed(choice.choice.candidates, choice.choice.position)
        return choice.choice.account

    def place_decode(
        self,
        facts: RequestFacts,
        now_s: float,
        hits: KnownHits | None = None,
        without: frozenset[int] = NOBODY,
    ) -> WorkerAccount | None:
        """As `choose_decode`, without a record."""
        if self._ranks_decode is not None and len(self._decode_pool) <= FEW:
            roomy = [a for a in self._decode_pool if has_room(facts, a) and a.slot not in without]
            return self._best(self._ranks_decode, roomy, facts, hits)
        choice = self.choose_decode(facts, hits, now_s, without)
        return None if choice is None else choice.account

    def _best(
        self, policy: RanksOne, accounts: list[WorkerAccount], facts: RequestFacts, hits: KnownHits | None
    ) -> WorkerAccount | None:
        if len(accounts) <= 1:
            return accounts[0] if accounts else None
        num_tokens = facts.num_prompt_tokens
        if hits is None:
            keys = [policy.rank_one(account, num_tokens) for account in accounts]
        else:
            held = hits.tokens_by_slot
            keys = [policy.rank_one(account, num_tokens - held.item(account.slot)) for account in accounts]
        best = min(keys)
        if keys.count(best) == 1:
            return accounts[keys.index(best)]
        tied = [account for account, key in zip(accounts, keys, strict=True) if key == best]
        return tied[self._draw(48) % len(tied)]

    # ── after the decision ───────────────────────────────────────────────────────────────────

    def committed(self, handoff_id: str, prefill: PrefillChoice, hits: KnownHits | None) -> None:
        """The request is on its way: what the next decisions should know of it."""
        choice = prefill.choice
        prefill.policy.committed(choice.candidates, choice.position)
        if hits is None:
            return
        if self._guard is not None and self._index is not None:
            unguarded = prefill.unguarded
            self._guard.observe(
                hits.prompt, unguarded.candidates, unguarded.position, self._index.hasher.block_size_tokens
            )
        self._expect(handoff_id, choice.slot, hits, choice.candidates.now_s)

    def computes(self, handoff_id: str, slot: int, hits: KnownHits | None, now_s: float) -> None:
        """As `committed` for a prompt that its decode worker will compute."""
        if hits is not None:
            self._expect(handoff_id, slot, hits, now_s)

    def _expect(self, handoff_id: str, slot: int, hits: KnownHits, now_s: float) -> None:
        # Whoever never tells what it stored is not known to store anything.
        if self._expectations is not None and self._index is not None and self._index.is_open(slot):
            self._expectations.expect(handoff_id, slot, hits.prompt, now_s)

    def leg_ended(self, handoff_id: str) -> None:
        """The prompt is computed and its events are in, or the leg is over without it."""
        if self._expectations is not None:
            self._expectations.settle(handoff_id)

    def worker_left(self, slot: int) -> None:
        if self._expectations is not None:
            self._expectations.forget(slot)


def _less(slots: Vector, without: frozenset[int]) -> Vector:
    return slots[~np.isin(slots, list(without))] if without else slots


def best_hit_tokens(hits: KnownHits) -> int:
    """Of the fleet: the ceiling of what routing could have saved for this prompt."""
    return int(np.max(hits.tokens_by_slot, initial=0))
