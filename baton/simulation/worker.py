"""One engine worker: legs are added, and steps of them planned and applied by its driver.

    step = worker.begin_step(now_s, max_num_steps=...)     None: nothing to compute
    ... until step.end_s, or earlier: worker.cut(now_s) says when the step in progress ends ...
    result = worker.end_step()

A step is made as vLLM makes it: `batch` says who gets a token and how much of which prompt is computed,
`places` who waits, who runs and who has which blocks. KV that comes from elsewhere is between the driver
and `worker.places`.

As long as nobody joins, finishes or runs out of blocks, decode steps only differ by one context
token per leg, so many of them are one `PlannedStep`: their time is the sum of an arithmetic series
(`StepTime` is linear in context). Prefix lookups, evictions and announcements work on the blocks of
one hash at a time (`kv_cache`, `naming`); blocks that a hand-off may still touch are in `holds`.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.contract.messages import WorkerLoad
from baton.scheduling.base import JobFacts, StepPolicy
from baton.simulation.batch import Batch
from baton.simulation.kv_cache import PrefixCache
from baton.simulation.legs import FinishedLeg, Leg, PlannedStep, StepResult
from baton.simulation.naming import BlockNames
from baton.simulation.places import Places
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
        self.places = Places(settings, self.cache, self._names)
        self._batch = Batch(settings, self.cache, self._names, self.places, scheduler)
        self.num_prefill_tokens_done = 0
        self.busy_s = 0.0
        """Spent in steps that have ended."""
        self._plan: PlannedStep | None = None

    # ── facts ────────────────────────────────────────────────────────────────────────────────

    @property
    def num_legs(self) -> int:
        return len(self.places.legs)

    @property
    def plan(self) -> PlannedStep | None:
        """The step in progress."""
        return self._plan

    @property
    def decoding(self) -> Sequence[Leg]:
        """Legs that get a token from each step of `plan`."""
        return self._batch.decodes

    def leg(self, leg_id: str) -> Leg | None:
        return self.places.legs.get(leg_id)

    def load(self) -> WorkerLoad:
        places = self.places
        return WorkerLoad(
            num_running=len(places.running),
            num_waiting=len(places.waiting) + len(places.fetching) + len(places.lining_up),
            num_free_blocks=self.cache.num_free_blocks,
            num_prefill_tokens_done=self.num_prefill_tokens_done,
            num_preemptions=places.num_preemptions,
        )

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Prompt and all output together; a leg that cannot is not to be added."""
        return self.settings.num_blocks_for(num_tokens) <= self.settings.num_blocks

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
        assert leg.num_prompt_tokens > 0 and leg.num_output_tokens > 0
        assert self.can_ever_hold(leg.num_prompt_tokens + leg.num_output_tokens - 1), leg.leg_id
        self.places.add(leg)
        if self._scheduler is not None:
            num_hits = 0
            if self.settings.has_prefix_cache and not leg.is_kv_on_its_way:
                num_hits = self.places.find(leg)[1]
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
        it takes its time all the same. `keep_blocks`: until `Places.release`. False: nothing is known
        of it."""
        if not self.places.end_early(leg_id, keep_blocks=keep_blocks):
            return not keep_blocks and self.places.release(leg_id)
        if self._scheduler is not None:
            self._scheduler.remove(leg_id)
        return True

    # ── stepping ─────────────────────────────────────────────────────────────────────────────

    def begin_step(self, now_s: float, max_num_steps: int = 1) -> PlannedStep | None:
        """Plan what is computed next. More than one step only if all do the same: see `PlannedStep`."""
        assert self._plan is None, "the step before has not ended"
        if self.places.lining_up:
            self.places.grant_credits()
        batch = self._batch
        batch.fill(now_s)
        decodes, chunks = batch.decodes, batch.chunks
        if not decodes and not chunks:
            return None
        num_steps = batch.num_equal_steps(max_num_steps)
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
        result.preempted = self.places.take_preempted()
        places, legs, block_size = self.places, self.places.legs, self.settings.block_size_tokens
        tokens, num_missing = result.tokens, 0
        for leg in self._batch.decodes:
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
            places.end(legs[finished.leg_id])
        for leg, chunk in self._batch.chunks:
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
                places.end(leg)
        self.num_prefill_tokens_done += result.num_prefill_tokens
        if self._scheduler is not None:
            self._charge(self._scheduler, result)
        result.events = self._names.take_events()
        return result

    def prefill_progress(self) -> list[tuple[str, int]]:
        """Prompts that the last step computed a part of and did not finish: how many of their tokens have
        KV here."""
        legs = self.places.legs
        return [(leg.leg_id, leg.num_kv_tokens) for leg, _ in self._batch.chunks if leg.leg_id in legs]

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

    def _charge(self, scheduler: StepPolicy, result: StepResult) -> None:
        now_s = result.end_s
        for leg, chunk in self._batch.chunks:
            # An ended one as well: what it cost may count for its tenant.
            num_outputs = 0 if leg.num_uncomputed and leg.leg_id in self.places.legs else 1
            scheduler.charge(leg.leg_id, num_prefill_tokens=chunk, num_output_tokens=num_outputs, now_s=now_s)
        for leg in self._batch.decodes:
            scheduler.charge(leg.leg_id, num_output_tokens=result.num_steps, now_s=now_s)
        for finished in (*result.finished_prefills, *result.finished):
            scheduler.remove(finished.leg_id)

    def _finished(self, leg: Leg) -> FinishedLeg:
        assert leg.num_cached_tokens is not None and leg.first_step_s is not None
        return FinishedLeg(leg.leg_id, leg.num_cached_tokens, leg.first_step_s)

    def _finish_prefill(self, leg: Leg) -> FinishedLeg:
        finished = self._finished(leg)
        if leg.keeps_kv:
            finished.num_held_blocks = leg.num_blocks
            self.places.holds.keep(leg)
        self.places.end(leg)
        return finished
