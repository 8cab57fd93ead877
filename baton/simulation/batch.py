"""Which legs of a simulated worker get the tokens of its next step.

Without a scheduler by age, as in vLLM: running legs first, oldest first: a decoding one gets a token, a
prompt gets what is left of the token budget. Then waiting legs are admitted while there is budget, a
place in the batch, and blocks for all tokens of the leg; one that does not fit holds up those behind
it, so none starves. A leg that grows over its blocks when none is free makes the youngest one lose
its own; that leg waits in front and computes everything again, less what the prefix cache still has.

With a scheduler (`baton.scheduling`) the same by its order.
"""

from __future__ import annotations

from collections.abc import Collection

from baton.scheduling.base import StepPolicy
from baton.simulation.kv_cache import PrefixCache
from baton.simulation.legs import Leg
from baton.simulation.naming import BlockNames
from baton.simulation.places import Places
from baton.simulation.settings import SimulatedWorkerSettings


class Batch:
    def __init__(
        self,
        settings: SimulatedWorkerSettings,
        cache: PrefixCache,
        names: BlockNames,
        places: Places,
        scheduler: StepPolicy | None,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._names = names
        self._places = places
        self._waiting, self._fetching, self._running = places.waiting, places.fetching, places.running
        self._scheduler = scheduler
        self.decodes: list[Leg] = []
        """Legs that get one token from each of the steps planned last."""
        self.chunks: list[tuple[Leg, int]] = []
        """Parts of prompts, in tokens, that the step planned last computes."""

    def fill(self, now_s: float) -> None:
        self.decodes, self.chunks = [], []
        if self._scheduler is None:
            self._fill_by_age()
        else:
            self._fill_by_rank(self._scheduler, now_s)

    def num_equal_steps(self, max_num_steps: int) -> int:
        """How many steps in a row, the one just filled first, would do the same: legs decode, none joins,
        none finishes before the last, and there are blocks for all."""
        if max_num_steps == 1 or not self.decodes or self.chunks or not self._is_order_fixed:
            return 1
        num_outputs_left = min([leg.num_outputs_left for leg in self.decodes])
        return self._fit(self.decodes, min(max_num_steps, num_outputs_left))

    def _fill_by_age(self) -> None:
        budget, num_preemptions = self._settings.max_num_batched_tokens, self._places.num_preemptions
        for leg in list(self._running.values()):
            if not budget or leg.leg_id not in self._running:
                break
            budget -= self._add_running(leg, budget, self._running)
        # Who has just lost its blocks would only take them back.
        if not self._waiting or num_preemptions != self._places.num_preemptions:
            return
        num_places = self._settings.max_batch_size - len(self._running) - len(self._fetching)
        while budget and num_places > 0 and self._waiting:
            leg = next(iter(self._waiting.values()))
            if not self._places.admit(leg):
                return
            num_places -= 1
            budget -= self._add_admitted(leg, budget)

    def _fill_by_rank(self, scheduler: StepPolicy, now_s: float) -> None:
        """Places and tokens to the best; who is not among them keeps its blocks. Who is better than
        somebody with blocks and has none takes them, but never those of a prompt being computed."""
        budget = self._settings.max_num_batched_tokens
        num_places = self._settings.max_batch_size - len(self._fetching)
        order = scheduler.order([*self._running, *self._waiting], now_s)
        is_blocked = False
        for position, leg_id in enumerate(order):
            if num_places <= 0 or not budget:
                return
            leg = self._running.get(leg_id)
            if leg is not None:
                behind = [other for other in order[position:] if other in self._running]
                used = self._add_running(leg, budget, behind)
                budget -= used
                num_places -= used > 0
            elif not is_blocked:
                leg = self._waiting[leg_id]
                while not self._places.admit(leg):
                    victims = [
                        other
                        for other in order[position + 1 :]
                        if other in self._running and self._running[other].is_decoding
                    ]
                    if not victims:
                        is_blocked = True
                        break
                    self._places.preempt(victims[-1])
                else:
                    num_places -= 1
                    budget -= self._add_admitted(leg, budget)

    def _add_running(self, leg: Leg, budget: int, victims: Collection[str]) -> int:
        """Tokens used. `victims`: who may lose their blocks for it, worst last; it is one of them."""
        if not leg.is_decoding:
            return self._add_chunk(leg, budget)
        if leg.num_kv_tokens >= leg.num_blocks * self._settings.block_size_tokens:
            while not self._cache.take(1):
                victim = next(other for other in reversed(list(victims)) if other in self._running)
                self._places.preempt(victim)
                if victim == leg.leg_id:
                    return 0
            leg.num_blocks += 1
            leg.num_own_blocks += 1
        self.decodes.append(leg)
        return 1

    def _add_admitted(self, leg: Leg, budget: int) -> int:
        if leg.is_kv_on_its_way:
            return 0
        if leg.is_decoding:
            self.decodes.append(leg)
            return 1
        return self._add_chunk(leg, budget)

    def _add_chunk(self, leg: Leg, budget: int) -> int:
        """The next part of a prompt. As in vLLM its blocks can be found by whoever is planned after it,
        in the same step."""
        chunk = min(leg.num_uncomputed, budget)
        self.chunks.append((leg, chunk))
        self._names.computed(leg, leg.num_kv_tokens + chunk)
        return chunk

    @property
    def _is_order_fixed(self) -> bool:
        """The same legs would run in the next step: nobody else could."""
        if self._scheduler is None:
            return True
        return not self._waiting and len(self.decodes) == len(self._running)

    def _fit(self, decodes: list[Leg], num_steps: int) -> int:
        """As many of these steps as there are blocks for; the first one has its blocks."""
        num_free, block_size = self._cache.num_free_blocks, self._settings.block_size_tokens
        if len(decodes) * (num_steps // block_size + 1) <= num_free:
            return num_steps
        low, high = 1, num_steps
        while low < high:
            middle = (low + high + 1) // 2
            num_missing = 0
            for leg in decodes:
                grown = -(-(leg.num_kv_tokens + middle) // block_size) - leg.num_blocks
                if grown > 0:
                    num_missing += grown
            if num_missing <= num_free:
                low = middle
            else:
                high = middle - 1
        return low
