"""vLLM's scheduler with a step policy of `baton.scheduling`: preemption between any two tokens.

vLLM loads one of the classes by name. Everything vLLM's own scheduler does it still does; before each of
its steps these decide four things:

* **Who runs.** `running` is sorted by the policy's order (vLLM takes its own victims from the end), and
  who is not among the first `max_batch_size` is parked: `next_decode_eligible_step` makes vLLM's loop
  pass it over for one step. It keeps its blocks and its place in the runner. `max_num_seqs` is therefore
  the number of residents, not the batch; were it the batch, nobody could overtake.
* **Who may enter.** The waiting queue that vLLM sees in a step holds only those whose turn it is, in that
  order, and the reads of KV that may begin (they take blocks, but no place). The others are put back after.
* **Who gives up memory.** When blocks run short, `baton.scheduling.SwapRule` names victims, furthest from
  their turn first. With a host tier (`host_swap`) their KV is copied there before the blocks are
  used again, and who was evicted stays, once back, until it has received as much again as it had (at least
  `MIN_STAY_TOKENS`): by our choice an answer of L tokens is swapped out at most 2 + log2(L / 32) times,
  however short memory is. Without a tier they are computed again, each at most `MAX_RECOMPUTES` times.
* **Who is charged.** Tokens that were delivered, when they are.

If everything fits into one batch, the batch is exactly vLLM's own.

Private names of vLLM are used throughout; `drift` checks them before the engine starts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from baton.engine.vllm.first_token import AsyncFirstTokenScheduler
from baton.engine.vllm.host_swap import HostTier, host_tier_of
from baton.engine.vllm.scheduler import QuietScheduler
from baton.engine.vllm.stats import SCHEDULER_STATS
from baton.scheduling import (
    FairShare,
    FirstIteration,
    Holding,
    JobFacts,
    ShortestPrefill,
    SwapChoice,
    SwapRule,
    by_name,
)

OPTIONS = "baton_scheduler"
"""In vLLM's `additional_config`: the options below. In a request's `extra_args`: its facts, by the names
of `JobFacts`, except `deadline_left_s`, which is time left."""
MAX_RECOMPUTES = 2
MIN_STAY_TOKENS = 32
MAX_READS_PER_STEP = 32


class PolicyMixin:
    """Before `QuietScheduler` or `AsyncFirstTokenScheduler` in the bases of a class."""

    def __init__(self, *arguments: Any, **named_arguments: Any) -> None:
        super().__init__(*arguments, **named_arguments)
        this: Any = self
        options = dict(this.vllm_config.additional_config.get(OPTIONS, {}))
        self._max_batch_size: int = options.get("max_batch_size", this.max_num_running_reqs)
        policy = by_name(
            options.get("policy", "skip-join-mlfq"),
            first_iteration=FirstIteration(per_token=options.get("prompt_token_cost", 0.0)),
            chunk_tokens=this.max_num_scheduled_tokens,
        )
        self._step_policy = FairShare(policy)
        self._prefill_policy = policy if isinstance(policy, ShortestPrefill) else None
        self._host: HostTier | None = host_tier_of(this.connector)
        self._max_recomputes = math.inf if options.get("is_offloaded", False) else MAX_RECOMPUTES
        num_blocks = this.cache_config.num_gpu_blocks
        self._swap_rule = SwapRule(
            reserve_blocks=options.get("reserve_blocks", max(1, num_blocks // 50)),
            lookahead_blocks=2 * self._max_batch_size if self._host is not None else 0,
        )
        # A prefill worker whose KV nobody reads begins no more prompts: those that run need the rest.
        self._max_unread_blocks = num_blocks // 2
        self._step_s = 0.02
        self._last_step_s: float | None = None
        self._stays_until: dict[str, int] = {}
        """Output tokens before which a request that was swapped out once is not swapped out again."""
        self._is_resetting = False
        self._num_recomputed_tokens = 0
        self._num_stalls = 0

    def _now_s(self) -> float:
        return time.monotonic()

    # ── requests come and go ─────────────────────────────────────────────────────────────────────

    def add_request(self, request: Request) -> None:
        this: Any = self
        is_new = request.request_id not in this.requests
        super().add_request(request)  # type: ignore[misc]
        if is_new and request.request_id in this.requests:
            self._step_policy.add(self._facts(request), self._now_s())

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        super()._update_request_as_session(session, update)  # type: ignore[misc]
        self._step_policy.remove(session.request_id)
        self._step_policy.add(self._facts(session), self._now_s())

    def _free_request(self, request: Request, *arguments: Any, **named_arguments: Any) -> Any:
        self._step_policy.remove(request.request_id)
        self._stays_until.pop(request.request_id, None)
        return super()._free_request(request, *arguments, **named_arguments)  # type: ignore[misc]

    def _facts(self, request: Request) -> JobFacts:
        this: Any = self
        now_s = self._now_s()
        params = request.sampling_params
        told = ((params.extra_args if params is not None else None) or {}).get(OPTIONS, {})
        num_uncached = 1
        if not _is_read_pending(request):
            num_uncached = request.num_tokens - this.kv_cache_manager.get_computed_blocks(request)[1]
        left_s = told.get("deadline_left_s")
        return JobFacts(
            job_id=request.request_id,
            arrival_s=now_s,
            num_uncached_tokens=num_uncached,
            num_expected_output_tokens=told.get("num_expected_output_tokens"),
            priority=told.get("priority", request.priority),
            key=told.get("key", ""),
            deadline_s=None if left_s is None else now_s + left_s,
        )

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        result: tuple[list[int], bool] = super()._update_request_with_output(  # type: ignore[misc]
            request, new_token_ids, is_stale
        )
        self._step_policy.charge(request.request_id, num_output_tokens=len(result[0]), now_s=self._now_s())
        return result

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]
        this: Any = self
        now_s = self._now_s()
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = this.requests[request_id]
            if request.num_preemptions:
                self._num_recomputed_tokens += max(0, num_tokens - 1)
                continue
            # Has been advanced already.
            num_prompt = request.num_prompt_tokens - (request.num_computed_tokens - num_tokens)
            if num_prompt > 0:
                self._step_policy.charge(
                    request_id, num_prefill_tokens=min(num_prompt, num_tokens), now_s=now_s
                )

    # ── steps ─────────────────────────────────────────────────────────────────────────────────

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        this: Any = self
        if this._pause_state != PauseState.UNPAUSED:
            return super().schedule(throttle_prefills)  # type: ignore[misc]
        now_s = self._now_s()
        self._note_step(now_s)
        this.max_num_active_reqs = this.max_num_running_reqs
        if self._prefill_policy is not None:
            withheld, late_holders = self._choose_prefills(self._prefill_policy, now_s)
        else:
            withheld, late_holders = self._choose(now_s)
        try:
            return super().schedule(throttle_prefills)  # type: ignore[misc]
        finally:
            this.waiting.extend(withheld)
            this.kv_holding_waiting.extend(late_holders)

    def _note_step(self, now_s: float) -> None:
        """A running mean of how long a step takes while there is something to do."""
        this: Any = self
        if self._last_step_s is not None:
            self._step_s = max(1e-4, 0.9 * self._step_s + 0.1 * (now_s - self._last_step_s))
        self._last_step_s = now_s if this.running else None

    def _choose(self, now_s: float) -> tuple[list[Request], list[Request]]:
        """Parks, evicts and sorts; leaves in the queues who may enter, and returns who may not."""
        this: Any = self
        ready, unready = self._split_holders()
        num_seats = self._num_seats()
        entering = [r for r in this.waiting if not _is_blocked(r)] if num_seats > 0 else []
        by_id = {r.request_id: r for group in (this.running, ready, entering) for r in group}
        order = self._step_policy.order(by_id.keys(), now_s)
        this.running[:] = [r for job_id in order if (r := by_id[job_id]).status == RequestStatus.RUNNING]
        num_free = this.kv_cache_manager.block_pool.get_num_free_blocks()
        # At most one block more for everyone who runs, all of it for everyone who enters.
        num_wanted = len(this.running) + len(ready) + sum(map(self._num_blocks_to_run, entering))
        is_tight = num_wanted + self._swap_rule.reserve_blocks > num_free
        if len(by_id) <= self._max_batch_size and not is_tight:
            present = set(entering)
            return _refill(this.waiting, [by_id[i] for i in order if by_id[i] in present], this.waiting), []
        # Who has just received its KV runs first: it costs one token, and vLLM's loop begins with it.
        ready_ids = {r.request_id for r in ready}
        admitted = [job_id for job_id in order if job_id in ready_ids]
        del admitted[max(0, min(self._max_batch_size, num_seats)) :]
        choice = self._active_set(
            order,
            ready_ids,
            by_id,
            num_places=self._max_batch_size - len(admitted),
            num_seats=num_seats - len(admitted),
            num_blocks=self._num_blocks_not_waiting() if is_tight else None,
        )
        if is_tight:
            entrants = self._make_room(order, admitted, choice, by_id, now_s)
        else:
            entrants = choice.entering(by_id)
        self._park_all_but(choice.active)
        allowed = [by_id[job_id] for job_id in entrants]
        withheld = _refill(this.waiting, allowed, this.waiting)
        late = _refill(this.kv_holding_waiting, [by_id[i] for i in admitted] + unready, ready)
        return withheld, late

    def _num_seats(self) -> int:
        """How many residents more vLLM takes. A place in the batch is of no use to who has no seat."""
        this: Any = self
        num_taken: int = len(this.running) + this.num_waiting_for_streaming_input
        return int(this.max_num_running_reqs - num_taken)

    def _split_holders(self) -> tuple[list[Request], list[Request]]:
        """Requests that wait with KV in memory: it has arrived, or it has not yet."""
        this: Any = self
        ready: list[Request] = []
        unready: list[Request] = []
        for request in this.kv_holding_waiting:
            is_here = request.request_id in this.finished_recving_kv_req_ids or not (
                this._is_blocked_waiting_status(request.status)
            )
            (ready if is_here else unready).append(request)
        return ready, unready

    def _num_blocks_not_waiting(self) -> int:
        """All, less those of requests that have KV and do not run yet."""
        this: Any = self
        num_held = sum(self._num_blocks(r.num_computed_tokens) for r in this.kv_holding_waiting)
        num_blocks: int = this.cache_config.num_gpu_blocks - 1
        return num_blocks - num_held

    def _active_set(
        self,
        order: list[str],
        ready_ids: set[str],
        by_id: dict[str, Request],
        *,
        num_places: int,
        num_seats: int,
        num_blocks: int | None,
    ) -> _Choice:
        """From the front of the order, as far as places and memory reach. None: memory is no concern."""
        this: Any = self
        room = num_blocks
        choice = _Choice()
        staying: set[str] = set()
        if room is not None:
            stayers = [
                request
                for request in this.running
                if request.request_id in self._stays_until and self._must_stay(request)
            ]
            staying = {request.request_id for request in stayers}
            room -= sum(map(self._num_blocks_to_run, stayers))
        loras: set[int] = set()
        num_reads = min(MAX_READS_PER_STEP, sum(map(_is_read_pending, this.waiting)))
        # A prompt that began is finished: half of it is of no use to anybody.
        begun = [r.request_id for r in this.running if r.is_prefill_chunk]
        for job_id in (*begun, *order):
            request = by_id[job_id]
            if job_id in ready_ids or job_id in choice.active:
                continue
            is_full = len(choice.active) + len(choice.returning) >= num_places
            if is_full and len(choice.reads) >= num_reads:
                break
            num_needed = 0 if room is None or job_id in staying else self._num_blocks_to_run(request)
            if room is not None and num_needed > max(0, room):
                continue
            is_running = request.status == RequestStatus.RUNNING
            is_read = not is_running and _is_read_pending(request)
            needs_seat = not (is_running or is_read)
            if is_read:
                if len(choice.reads) >= num_reads:
                    continue
                choice.reads.append(job_id)
            elif is_full or (needs_seat and num_seats <= 0) or not self._fits_loras(request, loras):
                continue
            elif not is_running and self._is_swapped_out(request):
                choice.returning.append(job_id)
            else:
                choice.active[job_id] = None
            num_seats -= needs_seat
            if room is not None:
                room -= num_needed
        return choice

    def _make_room(
        self, order: list[str], admitted: list[str], choice: _Choice, by_id: dict[str, Request], now_s: float
    ) -> list[str]:
        """Moves KV so that the chosen fit; returns who may leave the waiting queue, in that order."""
        this: Any = self
        runs_next = [*admitted, *choice.active, *choice.returning]
        chosen = set(runs_next)
        sequence = runs_next + [job_id for job_id in order if job_id not in chosen]
        residents = {request.request_id for request in this.running}
        joiners = [i for i in choice.active if i not in residents]
        growth = self._num_new_blocks(by_id[i] for i in (*admitted, *residents.intersection(choice.active)))
        num_free = this.kv_cache_manager.block_pool.get_num_free_blocks()
        arriving = sum(self._num_blocks_to_run(by_id[i]) for i in (*joiners, *choice.reads))
        away = self._away(by_id)
        moves = SwapChoice()
        if away or self._swap_rule.may_move(num_free, growth + arriving):
            waits = self._step_policy.waits(
                sequence, num_places=self._max_batch_size, step_s=self._step_s, now_s=now_s
            )
            moves = self._swap_rule.choose(
                [i for i in sequence if i in residents or i in away],
                dict(zip(sequence, waits, strict=True)),
                away,
                lambda job_id: self._holding(by_id[job_id]),
                num_places=len(runs_next),
                num_free_blocks=num_free,
                num_growth_blocks=growth,
                num_arriving_blocks=arriving,
            )
        for job_id in moves.evict:
            this.running.remove(by_id[job_id])
            this._preempt_request(
                by_id[job_id], time.monotonic(), drop_stale_output=this.requires_kv_delivery
            )
        if self._host is not None:
            for job_id in moves.back_up:
                self._back_up(by_id[job_id])
        returning: list[str] = []
        for job_id in moves.bring_back:
            if self._is_still_here(by_id[job_id]):
                # Nothing to load: it would run at once, and needs a place for that.
                if len(choice.active) + len(admitted) >= self._max_batch_size:
                    continue
                choice.active[job_id] = None
            returning.append(job_id)
        room = this.kv_cache_manager.block_pool.get_num_free_blocks() - growth
        entrants = []
        for job_id in (*joiners, *returning, *choice.reads):
            num_blocks = self._num_blocks_to_run(by_id[job_id])
            if num_blocks <= room:
                room -= num_blocks
                entrants.append(job_id)
            elif job_id in choice.active:
                del choice.active[job_id]
        # Places of those that found no room go to the next residents.
        evicted = set(moves.evict)
        num_unused = self._max_batch_size - len(admitted) - len(choice.active)
        for request in this.running[:]:
            if num_unused <= 0:
                break
            if request.request_id not in choice.active and request.request_id not in evicted:
                new_blocks = self._num_new_blocks((request,))
                if new_blocks <= room:
                    room -= new_blocks
                    choice.active[request.request_id] = None
                    num_unused -= 1
        if this.running and not (choice.active or entrants or admitted):
            # Nobody's next block is free. The first one runs, and vLLM takes the last one's for it.
            choice.active[this.running[0].request_id] = None
        return entrants

    def _holding(self, request: Request) -> Holding:
        """Of a resident, or of a request that was swapped out."""
        if request.status != RequestStatus.RUNNING:
            num_blocks = self._num_blocks_to_run(request)
            return Holding(num_blocks, num_blocks)
        num_computed = request.num_computed_tokens
        num_blocks = self._num_blocks(num_computed)
        if (
            request.num_in_flight_tokens
            or self._must_stay(request)
            or request.is_prefill_chunk
            or request.resumable
        ):
            return Holding(num_blocks, is_movable=False)
        if self._host is None:
            is_backed = request.num_preemptions < self._max_recomputes
        else:
            num_full = num_computed // _block_size(self) * _block_size(self)
            is_backed = self._host.num_saved_tokens(request.request_id) >= num_full
        return Holding(num_blocks, num_blocks if is_backed else 0)

    def _back_up(self, request: Request) -> None:
        """Its full blocks; the last, unfinished one follows when it is evicted."""
        assert self._host is not None
        this: Any = self
        num_tokens = request.num_computed_tokens // _block_size(self) * _block_size(self)
        block_ids = this.kv_cache_manager.get_block_ids(request.request_id)[0]
        self._host.save(request.request_id, block_ids, num_tokens)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        this: Any = self
        if self._host is not None and not self._is_resetting and not request.resumable:
            # What is not there yet is copied before this step computes: the blocks are still whole then.
            num_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
            num_before = self._host.num_saved_tokens(request.request_id)
            block_ids = this.kv_cache_manager.get_block_ids(request.request_id)[0]
            self._host.save(request.request_id, block_ids, num_tokens)
            self._host.num_swaps_out += 1
            if num_tokens - num_before > _block_size(self):
                self._num_stalls += 1
        if self._host is not None or math.isinf(self._max_recomputes):
            num_output = request.num_output_tokens
            self._stays_until[request.request_id] = num_output + max(MIN_STAY_TOKENS, num_output)
        super()._preempt_request(request, timestamp, drop_stale_output)  # type: ignore[misc]

    def reset_prefix_cache(self, *arguments: Any, **named_arguments: Any) -> bool:
        """Cached KV is no longer valid (new weights, say), and copies of it are not either."""
        self._is_resetting = True
        try:
            result: bool = super().reset_prefix_cache(*arguments, **named_arguments)  # type: ignore[misc]
        finally:
            self._is_resetting = False
        if self._host is not None:
            self._host.clear()
        return result

    def _park_all_but(self, active: Container[str]) -> None:
        this: Any = self
        # vLLM's loop counts the step up first and passes over who is not eligible yet: one step only.
        step = this.current_step + 2
        for request in this.running:
            if request.request_id in active:
                continue
            if request.next_decode_eligible_step < step:
                request.next_decode_eligible_step = step
            if request.spec_token_ids:
                request.spec_token_ids = []

    def _choose_prefills(self, policy: ShortestPrefill, now_s: float) -> tuple[list[Request], list[Request]]:
        """The same on a prefill worker, where tokens are scarce and not places."""
        this: Any = self
        entering = [r for r in this.waiting if not _is_blocked(r)] if self._num_seats() > 0 else []
        by_id = {r.request_id: r for group in (this.running, entering) for r in group}
        order = self._step_policy.order(by_id.keys(), now_s)
        num_used = this.cache_config.num_gpu_blocks - 1
        num_used -= this.kv_cache_manager.block_pool.get_num_free_blocks()
        num_unread = num_used - sum(self._num_blocks(r.num_computed_tokens) for r in this.running)
        is_beginning_allowed = not this.running or num_unread <= self._max_unread_blocks
        budget = this.max_num_scheduled_tokens
        active: dict[str, None] = {}
        for job_id in order:
            if budget <= 0 or len(active) >= self._max_batch_size:
                break
            if by_id[job_id].status == RequestStatus.RUNNING or is_beginning_allowed:
                active[job_id] = None
                budget -= max(1, policy.num_left(job_id))
        place = {job_id: position for position, job_id in enumerate(order)}
        this.running.sort(key=lambda request: place.get(request.request_id, len(place)))
        self._park_all_but(active)
        allowed = [by_id[i] for i in active if by_id[i].status != RequestStatus.RUNNING]
        return _refill(this.waiting, allowed, this.waiting), []

    # ── small facts ──────────────────────────────────────────────────────────────────────────────

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // _block_size(self))

    def _num_blocks_to_run(self, request: Request) -> int:
        """To compute its next token."""
        this: Any = self
        num_tokens, num_next = request.num_tokens, request.num_computed_tokens + 1
        num_blocks: int = -(-(num_tokens if num_tokens > num_next else num_next) // this.block_size)
        return num_blocks

    def _num_new_blocks(self, requests: Iterable[Request]) -> int:
        """To compute the next token of each, beyond what they have."""
        size, num_blocks = _block_size(self), 0
        for request in requests:
            num_computed = request.num_computed_tokens
            num_blocks += -(-max(request.num_tokens, num_computed + 1) // size) + -num_computed // size
        return num_blocks

    def _must_stay(self, request: Request) -> bool:
        """It has not yet made up for its last way to the host and back."""
        until = self._stays_until.get(request.request_id)
        return until is not None and request.num_output_tokens < until

    def _is_swapped_out(self, request: Request) -> bool:
        return (
            self._host is not None
            and request.status == RequestStatus.PREEMPTED
            and request.num_computed_tokens == 0
            and self._host.num_saved_tokens(request.request_id) > 0
        )

    def _is_still_here(self, request: Request) -> bool:
        """Swapped out, but no block of it has been used again yet."""
        assert self._host is not None
        this: Any = self
        num_cached = this.kv_cache_manager.get_computed_blocks(request)[1]
        return self._host.num_to_load(request, num_cached) == 0

    def _away(self, by_id: dict[str, Request]) -> set[str]:
        """Whose KV is on the host."""
        this: Any = self
        if len(by_id) == len(this.running):
            return set()
        return {job_id for job_id, request in by_id.items() if self._is_swapped_out(request)}

    def _fits_loras(self, request: Request, loras: set[int]) -> bool:
        this: Any = self
        if not this.lora_config or not request.lora_request:
            return True
        lora = request.lora_request.lora_int_id
        if lora not in loras and len(loras) >= this.lora_config.max_loras:
            return False
        loras.add(lora)
        return True

    def make_stats(self, *arguments: Any, **named_arguments: Any) -> Any:
        stats = super().make_stats(*arguments, **named_arguments)  # type: ignore[misc]
        if stats is not None:
            counters = {"num_recomputed_tokens": self._num_recomputed_tokens, "num_stalls": self._num_stalls}
            if self._host is not None:
                counters |= self._host.counters()
            # A dictionary of counts whose other keys vLLM does not look at; the connectors' own it does.
            stats.num_kv_fetch_reqs_by_stage |= {
                SCHEDULER_STATS + name: value for name, value in counters.items()
            }
        return stats


class MlfqScheduler(PolicyMixin, QuietScheduler):
    """For CPU, where vLLM schedules synchronously."""


class AsyncMlfqScheduler(PolicyMixin, AsyncFirstTokenScheduler):
    """For other devices, where vLLM plans a step while the one before is computed."""


@dataclass(slots=True)
class _Choice:
    active: dict[str, None] = field(default_factory=dict)
    """Get a token in this step."""
    returning: list[str] = field(default_factory=list)
    """It is their turn, but their KV is on the host."""
    reads: list[str] = field(default_factory=list)
    """May begin to read their KV from the prefill worker."""

    def entering(self, by_id: dict[str, Request]) -> list[str]:
        """Of all these, who is in the waiting queue now, in the order in which vLLM shall take them."""
        joiners = [i for i in self.active if by_id[i].status != RequestStatus.RUNNING]
        return joiners + self.returning + self.reads


def _refill(queue: Any, first: list[Request], everyone: Iterable[Request]) -> list[Request]:
    """Puts `first` in the queue, in this order, and returns the rest of `everyone`."""
    chosen = set(first)
    rest = [request for request in everyone if request not in chosen]
    queue.clear()
    queue.extend(first)
    return rest


def _block_size(scheduler: Any) -> int:
    size: int = scheduler.block_size
    return size


def _is_read_pending(request: Request) -> bool:
    """Its KV lies with a prefill worker and has not been asked for."""
    params = request.kv_transfer_params
    return bool(params and params.get("do_remote_prefill")) and request.num_computed_tokens == 0


def _is_blocked(request: Request) -> bool:
    if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        wanted = request.structured_output_request
        return wanted is None or wanted.grammar is None
    return request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
