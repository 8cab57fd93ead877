"""One engine worker: queue, batch, chunks, KV blocks and leases, stepped by its driver.

    step = worker.begin_step(now_s, max_num_steps=...)     None: nothing to compute
    ... until step.end_s, or earlier: worker.cut(now_s) says when the step in progress ends ...
    result = worker.end_step()

A step is made as vLLM makes it. Running legs first, oldest first: a decoding one gets a token, a
prompt gets what is left of the token budget. Then waiting legs are admitted while there is budget, a
place in the batch, and blocks for all tokens of the leg; one that does not fit holds up those behind
it, so none starves. A leg that grows over its blocks when none is free makes the youngest one lose
its own; that leg waits in front and computes everything again, less what the prefix cache still has.

A decode leg whose KV comes from elsewhere takes its place and its blocks first and appears in
`take_fetches`; its driver says what came of it (`kv_arrived`, `kv_lost`). One whose KV is streamed, so that
its blocks stay empty for long, first lines up for credits; those behind it go on meanwhile.

As long as nobody joins, finishes or runs out of blocks, decode steps only differ by one context
token per leg, so many of them are one `PlannedStep`: their time is the sum of an arithmetic series
(`StepTime` is linear in context). Prefix lookups, evictions and announcements work on the blocks of
one hash at a time (`kv_cache`, `naming`); blocks that a hand-off may still touch are in `holds`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from baton.contract.messages import WorkerLoad
from baton.handoff.credits import CreditLine
from baton.scheduling.base import JobFacts, StepPolicy
from baton.simulation.holds import Holds
from baton.simulation.kv_cache import PrefixCache, Run
from baton.simulation.legs import Fetch, FinishedLeg, Leg, PlannedStep, StepResult
from baton.simulation.naming import BlockNames
from baton.simulation.settings import SimulatedWorkerSettings
from baton.step_time import StepTime, StepWork, prefill_pairs


class SimulatedWorker:
    def __init__(
        self,
        settings: SimulatedWorkerSettings,
        step_time: StepTime,
        scheduler: StepPolicy | None = None,
    ) -> None:
        """`scheduler`: who goes first when not everybody fits; None: first come, first served."""
        self._scheduler = scheduler
        self.settings = settings
        self.step_time = step_time
        self.cache = PrefixCache(settings.num_blocks, settings.blocks_per_hash)
        self._names = BlockNames(settings, self.cache)
        self.num_prefill_tokens_done = 0
        self.num_preemptions = 0
        self.busy_s = 0.0
        """Spent in steps that have ended."""
        self._legs: dict[str, Leg] = {}
        # A leg is in `_legs` and in exactly one of these.
        self._waiting: OrderedDict[str, Leg] = OrderedDict()
        self._fetching: dict[str, Leg] = {}
        self._running: dict[str, Leg] = {}
        self._lining_up: OrderedDict[str, Leg] = OrderedDict()
        self._holds = Holds(self.cache)
        self._credits = CreditLine(
            max_reserved_blocks=max(1, int(settings.reserved_share * settings.num_blocks))
        )
        self._new_fetches: list[Fetch] = []
        self._preempted: list[str] = []
        self._plan: PlannedStep | None = None
        self._decodes: list[Leg] = []
        self._chunks: list[tuple[Leg, int]] = []

    # ── facts ────────────────────────────────────────────────────────────────────────────────

    @property
    def num_legs(self) -> int:
        return len(self._legs)

    @property
    def plan(self) -> PlannedStep | None:
        """The step in progress."""
        return self._plan

    @property
    def decoding(self) -> Sequence[Leg]:
        """Legs that get a token from each step of `plan`."""
        return self._decodes

    def leg(self, leg_id: str) -> Leg | None:
        return self._legs.get(leg_id)

    def load(self) -> WorkerLoad:
        num_waiting = len(self._waiting) + len(self._fetching) + len(self._lining_up)
        return WorkerLoad(
            num_running=len(self._running),
            num_waiting=num_waiting,
            num_free_blocks=self.cache.num_free_blocks,
            num_prefill_tokens_done=self.num_prefill_tokens_done,
            num_preemptions=self.num_preemptions,
        )

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.settings.block_size_tokens)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Prompt and all output together; a leg that cannot is not to be added."""
        return self.num_blocks_for(num_tokens) <= self.settings.num_blocks

    # ── legs come and go ─────────────────────────────────────────────────────────────────────

    def add_prefill(
        self,
        leg_id: str,
        num_prompt_tokens: int,
        hashes: Sequence[int],
        now_s: float,
        *,
        keep_kv: bool,
        packed: bytes = b"",
        namespace: str = "",
    ) -> None:
        """Compute a prompt and one token. `hashes` name the prompt's blocks in chains, `blocks_per_hash`
        at a time; a last one may name fewer. `packed` are its tokens, only needed for KV events."""
        leg = Leg(leg_id, num_prompt_tokens, 1, hashes, packed, namespace, now_s)
        leg.is_prefill, leg.keeps_kv = True, keep_kv
        self._add(leg)

    def add_decode(
        self,
        leg_id: str,
        num_prompt_tokens: int,
        num_output_tokens: int,
        hashes: Sequence[int],
        now_s: float,
        *,
        is_kv_on_its_way: bool,
        is_streamed: bool = False,
        is_kv_here: bool = False,
        packed: bytes = b"",
        namespace: str = "",
    ) -> None:
        """Compute output. Without KV from elsewhere the prompt is computed here, first. KV that is streamed
        is still being computed there. KV that is here needs blocks all the same, but no fetch."""
        leg = Leg(leg_id, num_prompt_tokens, num_output_tokens, hashes, packed, namespace, now_s)
        leg.is_kv_on_its_way, leg.is_kv_here, leg.is_streamed = is_kv_on_its_way, is_kv_here, is_streamed
        self._add(leg)

    def _add(self, leg: Leg) -> None:
        assert leg.leg_id not in self._legs, f"{leg.leg_id} is in flight"
        assert leg.num_prompt_tokens > 0 and leg.num_output_tokens > 0
        assert self.can_ever_hold(leg.num_prompt_tokens + leg.num_output_tokens - 1), leg.leg_id
        self._legs[leg.leg_id] = leg
        (self._lining_up if leg.is_streamed else self._waiting)[leg.leg_id] = leg
        if self._scheduler is not None:
            num_hits = 0
            if self.settings.has_prefix_cache and not leg.is_kv_on_its_way:
                num_hits = self._find(leg)[1]
            self._scheduler.add(
                JobFacts(
                    job_id=leg.leg_id,
                    arrival_s=leg.added_s,
                    num_uncached_tokens=0
                    if leg.is_kv_on_its_way or leg.is_kv_here
                    else leg.num_prompt_tokens - num_hits * self.settings.block_size_tokens,
                    num_output_tokens=leg.num_output_tokens,
                ),
                leg.added_s,
            )

    def end_early(self, leg_id: str, *, keep_blocks: bool = False) -> bool:
        """Stop a leg and free what it has, or let go of a finished prefill's KV. Also while a step runs:
        it takes its time all the same. `keep_blocks`: until `release`. False: nothing is known of it."""
        leg = self._legs.pop(leg_id, None)
        if leg is None:
            return not keep_blocks and self.release(leg_id)
        for place in (self._running, self._waiting, self._fetching, self._lining_up):
            place.pop(leg_id, None)
        if keep_blocks:
            self._holds.keep(leg)
        elif leg.is_streamed:
            self._credits.give_back(leg_id)
        self._free(leg)
        if self._scheduler is not None:
            self._scheduler.remove(leg_id)
        return True

    def take_fetches(self) -> list[Fetch]:
        """Decode legs that got their blocks since the last call."""
        fetches, self._new_fetches = self._new_fetches, []
        return fetches

    def kv_arrived(
        self, leg_id: str, num_tokens: int | None = None, *, has_first_token: bool = False
    ) -> None:
        """KV of so many prompt tokens (None: all) is in the leg's blocks; it joins the next step. With the
        first token of its output nothing of the prompt is left to compute."""
        leg = self._fetching.pop(leg_id)
        if has_first_token:
            leg.num_outputs_done = 1
        self._receive(leg, num_tokens)

    def _receive(self, leg: Leg, num_tokens: int | None = None) -> None:
        leg.is_kv_on_its_way = leg.is_kv_here = False
        self._give_credits_back(leg)
        self._running[leg.leg_id] = leg
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
        leg = self._legs[leg_id]
        leg.is_kv_on_its_way = False
        self._give_credits_back(leg)
        if self._fetching.pop(leg_id, None) is not None:
            self._running[leg_id] = leg
        elif self._lining_up.pop(leg_id, None) is not None:
            self._waiting[leg_id] = leg

    def set_aside(self, leg_id: str) -> None:
        """Nothing will come, but somebody may still write to its blocks: they stay until `release`, with
        their credits, and the leg computes its prompt in others. It has waited: it goes first."""
        leg = self._fetching.pop(leg_id)
        leg.is_kv_on_its_way = leg.is_streamed = False
        self._holds.keep(leg)
        self._free(leg)
        self._waiting[leg_id] = leg
        self._waiting.move_to_end(leg_id, last=False)

    def _give_credits_back(self, leg: Leg) -> None:
        if leg.is_streamed:
            leg.is_streamed = False
            self._credits.give_back(leg.leg_id)

    def freeze(self, leg_id: str) -> None:
        """A running leg keeps its place and its blocks, and nothing of it is computed any more."""
        leg = self._running.pop(leg_id, None)
        if leg is not None:
            self._fetching[leg_id] = leg

    # ── held blocks ──────────────────────────────────────────────────────────────────────────

    def release(self, leg_id: str) -> bool:
        """Blocks that were kept, of a finished prefill or of a leg that is over, are free. False: none
        are kept."""
        self._credits.give_back(leg_id)
        return self._holds.release(leg_id)

    @property
    def num_holds(self) -> int:
        return len(self._holds)

    # ── stepping ─────────────────────────────────────────────────────────────────────────────

    def begin_step(self, now_s: float, max_num_steps: int = 1) -> PlannedStep | None:
        """Plan what is computed next. More than one step only if all do the same: see `PlannedStep`."""
        assert self._plan is None, "the step before has not ended"
        if self._lining_up:
            self._grant_credits()
        decodes = self._decodes = []
        chunks = self._chunks = []
        if self._scheduler is None:
            self._fill_by_age()
        else:
            self._fill_by_rank(self._scheduler, now_s)
        if not decodes and not chunks:
            return None
        num_steps = 1
        if decodes and not chunks and max_num_steps > 1 and self._is_order_fixed:
            num_steps = min(max_num_steps, min([leg.num_outputs_left for leg in decodes]))
            num_steps = self._fit(decodes, num_steps)
        num_prefill_tokens, pairs = 0, 0.0
        for leg, chunk in chunks:
            num_prefill_tokens += chunk
            pairs += prefill_pairs(chunk, leg.num_kv_tokens)
            if leg.first_step_s is None:
                leg.first_step_s = now_s
        num_context_tokens = len(decodes)
        for leg in decodes:
            num_context_tokens += leg.num_kv_tokens
            if leg.first_step_s is None:
                leg.first_step_s = now_s
        work = StepWork(num_prefill_tokens, pairs, len(decodes), num_context_tokens)
        first_s = self.step_time.step_s(work)
        end_s = now_s + self._steps_s(work, num_steps, first_s)
        self._plan = PlannedStep(work, num_steps, now_s, end_s, first_s)
        return self._plan

    def cut(self, now_s: float) -> float:
        """Somebody wants to join: end with the step in progress now. Returns when that is."""
        plan = self._plan
        assert plan is not None
        if plan.num_steps > 1:
            elapsed_s = now_s - plan.start_s
            low, high = 1, plan.num_steps
            while low < high:
                middle = (low + high) // 2
                if self._steps_s(plan.work, middle, plan.first_s) >= elapsed_s:
                    high = middle
                else:
                    low = middle + 1
            if low < plan.num_steps:
                end_s = plan.start_s + self._steps_s(plan.work, low, plan.first_s)
                plan = self._plan = plan._replace(num_steps=low, end_s=end_s)
        return plan.end_s

    def end_step(self) -> StepResult:
        """What came of the planned step, or of what `cut` left of it."""
        plan = self._plan
        assert plan is not None, "no step was begun"
        self._plan = None
        num_steps, now_s = plan.num_steps, plan.end_s
        self.busy_s += now_s - plan.start_s
        result = StepResult(num_steps, now_s, now_s)
        if num_steps > 1:
            result.first_end_s = plan.start_s + plan.first_s
        result.preempted, self._preempted = self._preempted, []
        legs, block_size = self._legs, self.settings.block_size_tokens
        tokens, num_missing = result.tokens, 0
        for leg in self._decodes:
            if leg.leg_id not in legs:
                continue
            leg.num_kv_tokens += num_steps
            if not leg.num_outputs_done:
                result.first_tokens.append(leg.leg_id)
            leg.num_outputs_done += num_steps
            tokens.append((leg.leg_id, num_steps))
            grown = -(-leg.num_kv_tokens // block_size) - leg.num_blocks
            if grown > 0:
                leg.num_blocks += grown
                leg.num_own_blocks += grown
                num_missing += grown
            if leg.num_outputs_done >= leg.num_output_tokens:
                result.finished.append(self._finished(leg))
        if num_missing:
            has_them = self.cache.take(num_missing)
            assert has_them, "blocks were counted when the step was planned"
        for finished in result.finished:
            self._end(legs[finished.leg_id])
        for leg, chunk in self._chunks:
            if leg.leg_id not in legs:
                continue
            result.num_prefill_tokens += chunk
            leg.num_kv_tokens += chunk
            if leg.num_uncomputed:
                continue
            if not leg.num_outputs_done and not leg.is_prefill:
                result.first_tokens.append(leg.leg_id)
            leg.num_outputs_done += 1
            if leg.is_prefill:
                result.finished_prefills.append(self._finish_prefill(leg))
                continue
            tokens.append((leg.leg_id, 1))
            leg.is_decoding = True
            if leg.num_outputs_done >= leg.num_output_tokens:
                result.finished.append(self._finished(leg))
                self._end(leg)
        self.num_prefill_tokens_done += result.num_prefill_tokens
        if self._scheduler is not None:
            self._charge(self._scheduler, result)
        result.events = self._names.take_events()
        return result

    def prefill_progress(self) -> list[tuple[str, int]]:
        """Prompts that the last step computed a part of and did not finish: how many of their tokens have
        KV here."""
        return [(leg.leg_id, leg.num_kv_tokens) for leg, _ in self._chunks if leg.leg_id in self._legs]

    # ── inside a step ────────────────────────────────────────────────────────────────────────

    def _steps_s(self, work: StepWork, num_steps: int, first_s: float) -> float:
        if num_steps == 1:
            return first_s
        # Each reads one more token per leg than the one before, and time is linear in that.
        last = StepWork(
            work.num_prefill_tokens,
            work.num_prefill_pairs,
            work.num_decodes,
            work.num_context_tokens + work.num_decodes * (num_steps - 1),
        )
        return num_steps * (first_s + self.step_time.step_s(last)) / 2

    def _grant_credits(self) -> None:
        for leg in list(self._lining_up.values()):
            num_blocks = self.num_blocks_for(leg.num_tokens) - self._find(leg)[1]
            if not self._credits.ask(leg.leg_id, num_blocks):
                return
            del self._lining_up[leg.leg_id]
            self._waiting[leg.leg_id] = leg

    def _add_chunk(self, leg: Leg, budget: int) -> int:
        """The next part of a prompt. As in vLLM its blocks can be found by whoever is planned after it,
        in the same step."""
        chunk = min(leg.num_uncomputed, budget)
        self._chunks.append((leg, chunk))
        self._names.computed(leg, leg.num_kv_tokens + chunk)
        return chunk

    @property
    def _is_order_fixed(self) -> bool:
        """The same legs would run in the next step: nobody else could."""
        if self._scheduler is None:
            return True
        return not self._waiting and len(self._decodes) == len(self._running)

    def _fill_by_age(self) -> None:
        budget, num_preemptions = self.settings.max_num_batched_tokens, self.num_preemptions
        for leg in list(self._running.values()):
            if not budget or leg.leg_id not in self._running:
                break
            budget -= self._add_running(leg, budget, self._running)
        # Who has just lost its blocks would only take them back.
        if not self._waiting or num_preemptions != self.num_preemptions:
            return
        num_places = self.settings.max_batch_size - len(self._running) - len(self._fetching)
        while budget and num_places > 0 and self._waiting:
            leg = next(iter(self._waiting.values()))
            if not self._admit(leg):
                return
            num_places -= 1
            budget -= self._add_admitted(leg, budget)

    def _fill_by_rank(self, scheduler: StepPolicy, now_s: float) -> None:
        """Places and tokens to the best; who is not among them keeps its blocks. Who is better than
        somebody with blocks and has none takes them, but never those of a prompt being computed."""
        budget = self.settings.max_num_batched_tokens
        num_places = self.settings.max_batch_size - len(self._fetching)
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
                while not self._admit(leg):
                    victims = [
                        other
                        for other in order[position + 1 :]
                        if other in self._running and self._running[other].is_decoding
                    ]
                    if not victims:
                        is_blocked = True
                        break
                    self._preempt(victims[-1])
                else:
                    num_places -= 1
                    budget -= self._add_admitted(leg, budget)

    def _add_running(self, leg: Leg, budget: int, victims: Collection[str]) -> int:
        """Tokens used. `victims`: who may lose their blocks for it, worst last; it is one of them."""
        if not leg.is_decoding:
            return self._add_chunk(leg, budget)
        if leg.num_kv_tokens >= leg.num_blocks * self.settings.block_size_tokens:
            while not self.cache.take(1):
                victim = next(other for other in reversed(list(victims)) if other in self._running)
                self._preempt(victim)
                if victim == leg.leg_id:
                    return 0
            leg.num_blocks += 1
            leg.num_own_blocks += 1
        self._decodes.append(leg)
        return 1

    def _add_admitted(self, leg: Leg, budget: int) -> int:
        if leg.is_kv_on_its_way:
            return 0
        if leg.is_decoding:
            self._decodes.append(leg)
            return 1
        return self._add_chunk(leg, budget)

    def _find(self, leg: Leg) -> tuple[list[Run], int]:
        """(runs with the beginning of its prompt, full blocks of it in them)"""
        if not self.settings.has_prefix_cache:
            return [], 0
        max_hits = (leg.num_prompt_tokens - 1) // self.settings.block_size_tokens
        runs = self.cache.match(leg.hashes, max_hits)
        return runs, self.cache.num_hit_blocks(runs, max_hits)

    def _admit(self, leg: Leg) -> bool:
        """Blocks for all its tokens. False: there are not so many."""
        settings, cache = self.settings, self.cache
        runs, num_hits = ([], 0) if leg.num_swapped_tokens else self._find(leg)
        num_blocks = self.num_blocks_for(leg.num_tokens)
        if num_blocks - num_hits > cache.num_free_blocks - cache.num_idle_blocks(runs):
            return False
        cache.use(runs)
        cache.take(num_blocks - num_hits)
        del self._waiting[leg.leg_id]
        leg.runs, leg.num_blocks, leg.num_own_blocks = runs, num_blocks, num_blocks - num_hits
        leg.num_named = len(runs)
        if runs and runs[-1].num_blocks < settings.blocks_per_hash:
            leg.num_named -= 1
        leg.num_kv_tokens = num_hits * settings.block_size_tokens
        if leg.num_cached_tokens is None:
            leg.num_cached_tokens = leg.num_kv_tokens
        if leg.num_swapped_tokens:
            leg.is_kv_on_its_way = True
            self._fetching[leg.leg_id] = leg
            self._new_fetches.append(Fetch(leg.leg_id, leg.num_swapped_tokens, True))
        elif leg.is_kv_on_its_way:
            self._fetching[leg.leg_id] = leg
            self._new_fetches.append(Fetch(leg.leg_id, leg.num_prompt_tokens - leg.num_kv_tokens, False))
        elif leg.is_kv_here:
            self._receive(leg)
        else:
            self._running[leg.leg_id] = leg
        return True

    def _charge(self, scheduler: StepPolicy, result: StepResult) -> None:
        now_s = result.end_s
        for leg, chunk in self._chunks:
            # An ended one as well: what it cost may count for its tenant.
            num_outputs = 0 if leg.num_uncomputed and leg.leg_id in self._legs else 1
            scheduler.charge(leg.leg_id, num_prefill_tokens=chunk, num_output_tokens=num_outputs, now_s=now_s)
        for leg in self._decodes:
            scheduler.charge(leg.leg_id, num_output_tokens=result.num_steps, now_s=now_s)
        for finished in (*result.finished_prefills, *result.finished):
            scheduler.remove(finished.leg_id)

    def _fit(self, decodes: list[Leg], num_steps: int) -> int:
        """As many of these steps as there are blocks for; the first one has its blocks."""
        num_free, block_size = self.cache.num_free_blocks, self.settings.block_size_tokens
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

    def _preempt(self, leg_id: str) -> None:
        leg = self._running.pop(leg_id)
        if self.settings.can_swap and leg.is_decoding:
            leg.num_swapped_tokens = leg.num_kv_tokens
        self._free(leg)
        self._waiting[leg_id] = leg
        self._waiting.move_to_end(leg_id, last=False)
        self._preempted.append(leg_id)
        self.num_preemptions += 1

    def _free(self, leg: Leg) -> None:
        self.cache.leave(leg.runs, leg.num_own_blocks)
        leg.runs, leg.num_blocks, leg.num_own_blocks, leg.num_named = [], 0, 0, 0
        leg.num_kv_tokens = 0
        leg.is_decoding = False

    def _end(self, leg: Leg) -> None:
        del self._legs[leg.leg_id]
        del self._running[leg.leg_id]
        self._free(leg)

    def _finished(self, leg: Leg) -> FinishedLeg:
        assert leg.num_cached_tokens is not None and leg.first_step_s is not None
        return FinishedLeg(leg.leg_id, leg.num_cached_tokens, leg.first_step_s)

    def _finish_prefill(self, leg: Leg) -> FinishedLeg:
        finished = self._finished(leg)
        if leg.keeps_kv:
            finished.num_held_blocks = leg.num_blocks
            self._holds.keep(leg)
        self._end(leg)
        return finished
