"""Where each leg of a simulated worker is, and which blocks are its own.

A leg waits, gets its KV from elsewhere, or runs. It takes blocks for all its tokens when it stops waiting, so
one that gets KV has its place and its blocks first, and appears in `take_fetches`; its driver says what came
of it (`kv_arrived`, `kv_lost`, `set_aside`). One whose KV is streamed, so that its blocks stay empty for
long, first lines up for credits; those behind it go on meanwhile.

Who stops waiting, and who loses its blocks again, is decided in `batch`.
"""

from __future__ import annotations

from collections import OrderedDict

from baton.handoff.credits import CreditLine
from baton.simulation.holds import Holds
from baton.simulation.kv_cache import PrefixCache, Run
from baton.simulation.legs import Fetch, Leg
from baton.simulation.naming import BlockNames
from baton.simulation.settings import SimulatedWorkerSettings


class Places:
    def __init__(self, settings: SimulatedWorkerSettings, cache: PrefixCache, names: BlockNames) -> None:
        self._settings = settings
        self._cache = cache
        self._names = names
        self.num_preemptions = 0
        self.legs: dict[str, Leg] = {}
        # A leg is in `legs` and in exactly one of these.
        self.waiting: OrderedDict[str, Leg] = OrderedDict()
        self.fetching: dict[str, Leg] = {}
        self.running: dict[str, Leg] = {}
        self.lining_up: OrderedDict[str, Leg] = OrderedDict()
        self.holds = Holds(cache)
        self._credits = CreditLine(
            max_reserved_blocks=max(1, int(settings.reserved_share * settings.num_blocks))
        )
        self._new_fetches: list[Fetch] = []
        self._preempted: list[str] = []

    # ── legs come and go ─────────────────────────────────────────────────────────────────────

    def add(self, leg: Leg) -> None:
        assert leg.leg_id not in self.legs, f"{leg.leg_id} is in flight"
        self.legs[leg.leg_id] = leg
        (self.lining_up if leg.is_streamed else self.waiting)[leg.leg_id] = leg

    def end(self, leg: Leg) -> None:
        """A running leg is over; its blocks are free, unless they were kept."""
        del self.legs[leg.leg_id]
        del self.running[leg.leg_id]
        self._free(leg)

    def end_early(self, leg_id: str, *, keep_blocks: bool) -> bool:
        """Wherever it is. False: there is no such leg."""
        leg = self.legs.pop(leg_id, None)
        if leg is None:
            return False
        for place in (self.running, self.waiting, self.fetching, self.lining_up):
            place.pop(leg_id, None)
        if keep_blocks:
            self.holds.keep(leg)
        elif leg.is_streamed:
            self._credits.give_back(leg_id)
        self._free(leg)
        return True

    def release(self, leg_id: str) -> bool:
        """Blocks that were kept, of a finished prefill or of a leg that is over, are free. False: none
        are kept."""
        self._credits.give_back(leg_id)
        return self.holds.release(leg_id)

    # ── KV from elsewhere ────────────────────────────────────────────────────────────────────

    def take_fetches(self) -> list[Fetch]:
        """Decode legs that got their blocks since the last call."""
        fetches, self._new_fetches = self._new_fetches, []
        return fetches

    def kv_arrived(
        self, leg_id: str, num_tokens: int | None = None, *, has_first_token: bool = False
    ) -> None:
        """KV of so many prompt tokens (None: all) is in the leg's blocks; it joins the next step. With the
        first token of its output nothing of the prompt is left to compute."""
        leg = self.fetching.pop(leg_id)
        if has_first_token:
            leg.num_outputs_done = 1
        self._receive(leg, num_tokens)

    def _receive(self, leg: Leg, num_tokens: int | None = None) -> None:
        leg.is_kv_on_its_way = leg.is_kv_here = False
        self._give_credits_back(leg)
        self.running[leg.leg_id] = leg
        if leg.num_swapped_tokens:
            leg.num_kv_tokens, leg.num_swapped_tokens = leg.num_swapped_tokens, 0
            leg.is_decoding = True
            return
        # Logits do not travel: without an output token the last position is computed here.
        limit = leg.num_tokens - 1
        leg.num_kv_tokens = max(leg.num_kv_tokens, limit if num_tokens is None else min(num_tokens, limit))
        leg.is_decoding = leg.num_uncomputed == 1
        self._names.computed(leg, leg.num_prompt_tokens if leg.is_decoding else leg.num_kv_tokens)

    def kv_lost(self, leg_id: str) -> None:
        """Nothing came, or nothing will, and nobody writes to its blocks: the leg computes its prompt."""
        leg = self.legs[leg_id]
        leg.is_kv_on_its_way = False
        self._give_credits_back(leg)
        if self.fetching.pop(leg_id, None) is not None:
            self.running[leg_id] = leg
        elif self.lining_up.pop(leg_id, None) is not None:
            self.waiting[leg_id] = leg

    def set_aside(self, leg_id: str) -> None:
        """Nothing will come, but somebody may still write to its blocks: they stay until `release`, with
        their credits, and the leg computes its prompt in others. It has waited: it goes first."""
        leg = self.fetching.pop(leg_id)
        leg.is_kv_on_its_way = leg.is_streamed = False
        self.holds.keep(leg)
        self._free(leg)
        self.waiting[leg_id] = leg
        self.waiting.move_to_end(leg_id, last=False)

    def _give_credits_back(self, leg: Leg) -> None:
        if leg.is_streamed:
            leg.is_streamed = False
            self._credits.give_back(leg.leg_id)

    def freeze(self, leg_id: str) -> None:
        """A running leg keeps its place and its blocks, and nothing of it is computed any more."""
        leg = self.running.pop(leg_id, None)
        if leg is not None:
            self.fetching[leg_id] = leg

    # ── blocks are taken and lost ────────────────────────────────────────────────────────────

    def grant_credits(self) -> None:
        for leg in list(self.lining_up.values()):
            num_blocks = self._settings.num_blocks_for(leg.num_tokens) - self.find(leg)[1]
            if not self._credits.ask(leg.leg_id, num_blocks):
                return
            del self.lining_up[leg.leg_id]
            self.waiting[leg.leg_id] = leg

    def find(self, leg: Leg) -> tuple[list[Run], int]:
        """(runs with the beginning of its prompt, full blocks of it in them)"""
        if not self._settings.has_prefix_cache:
            return [], 0
        max_hits = (leg.num_prompt_tokens - 1) // self._settings.block_size_tokens
        runs = self._cache.match(leg.hashes, max_hits)
        return runs, self._cache.num_hit_blocks(runs, max_hits)

    def admit(self, leg: Leg) -> bool:
        """Blocks for all its tokens. False: there are not so many."""
        settings, cache = self._settings, self._cache
        runs, num_hits = ([], 0) if leg.num_swapped_tokens else self.find(leg)
        num_blocks = settings.num_blocks_for(leg.num_tokens)
        if num_blocks - num_hits > cache.num_free_blocks - cache.num_idle_blocks(runs):
            return False
        cache.use(runs)
        cache.take(num_blocks - num_hits)
        del self.waiting[leg.leg_id]
        leg.runs, leg.num_blocks, leg.num_own_blocks = runs, num_blocks, num_blocks - num_hits
        leg.num_named = len(runs)
        if runs and runs[-1].num_blocks < settings.blocks_per_hash:
            leg.num_named -= 1
        leg.num_kv_tokens = num_hits * settings.block_size_tokens
        if leg.num_cached_tokens is None:
            leg.num_cached_tokens = leg.num_kv_tokens
        if leg.num_swapped_tokens:
            leg.is_kv_on_its_way = True
            self.fetching[leg.leg_id] = leg
            self._new_fetches.append(Fetch(leg.leg_id, leg.num_swapped_tokens, True))
        elif leg.is_kv_on_its_way:
            self.fetching[leg.leg_id] = leg
            self._new_fetches.append(Fetch(leg.leg_id, leg.num_prompt_tokens - leg.num_kv_tokens, False))
        elif leg.is_kv_here:
            self._receive(leg)
        else:
            self.running[leg.leg_id] = leg
        return True

    def preempt(self, leg_id: str) -> None:
        leg = self.running.pop(leg_id)
        if self._settings.can_swap and leg.is_decoding:
            leg.num_swapped_tokens = leg.num_kv_tokens
        self._free(leg)
        self.waiting[leg_id] = leg
        self.waiting.move_to_end(leg_id, last=False)
        self._preempted.append(leg_id)
        self.num_preemptions += 1

    def take_preempted(self) -> list[str]:
        """Legs that lost their blocks since the last call."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def _free(self, leg: Leg) -> None:
        self._cache.leave(leg.runs, leg.num_own_blocks)
        leg.runs, leg.num_blocks, leg.num_own_blocks, leg.num_named = [], 0, 0, 0
        leg.num_kv_tokens = 0
        leg.is_decoding = False
