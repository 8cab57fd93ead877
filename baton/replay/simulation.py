"""A trace through a fleet, in virtual time: a heap of events, and what a coordinator does at each.

    arrival ─> queue ─> decode reserved, prefill chosen ─> prefill ─> transfer ─> decode ─> end

Decisions are made by the production code (`baton.policy.chooser`): room on a decode worker first, then
the prefill worker, then whether the prompt stays with the decode worker; first come first served;
what finds no room waits. A prompt that stays, or lands on one worker for both phases, is one leg
that does both. Workers are stepped only when something happens to
them: while a batch just decodes, hundreds of steps are one event (`SimulatedWorker.begin_step`), cut
short when somebody joins.

Deterministic: the same trace, settings and seed give the same result to the last bit.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from time import process_time
from typing import Any

from baton.policy.base import RequestFacts
from baton.policy.chooser import commit
from baton.replay.fleet import Fleet, Member
from baton.replay.listening import Listener
from baton.replay.requests import Prompts, Request
from baton.replay.result import ReplayResult, result_of
from baton.replay.settings import ReplaySettings
from baton.simulation import FinishedLeg, StepResult
from baton.workload import Trace, WorkloadError

_MAX_STEPS = 1 << 20
"""Decode steps planned at once; the end of the first leg or somebody's arrival comes much earlier."""


def replay(
    trace: Trace, settings: ReplaySettings, on_finished: Callable[[int], None] | None = None
) -> ReplayResult:
    """`on_finished(n)` after every n-th finished request, for progress bars. Raises WorkloadError if
    some request fits no worker, before anything is simulated."""
    return _Replay(trace, settings, on_finished).run()


class _Replay:
    def __init__(
        self, trace: Trace, settings: ReplaySettings, on_finished: Callable[[int], None] | None
    ) -> None:
        self._trace = trace
        self._settings = settings
        self._on_finished = on_finished
        self._check_sizes()
        self._fleet = Fleet(settings, trace)
        self._prompts = Prompts(trace)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_events = 0
        self._queue: deque[Request] = deque()
        self._requests: list[Request] = [
            Request(*columns)
            for columns in zip(
                range(len(trace)),
                trace.arrival_s.tolist(),
                trace.num_prompt_tokens.tolist(),
                trace.num_output_tokens.tolist(),
                strict=True,
            )
        ]
        self._listener: Listener | None = None
        if self._fleet.pace is not None:
            is_late = settings.report_delay_s > 0
            self._listener = Listener(self._fleet, self._fleet.pace, self._requests, is_late=is_late)
        self._next_turn: dict[int, int] = {}
        self._num_finished = 0
        self._now_s = 0.0

    def _check_sizes(self) -> None:
        worker = self._settings.worker
        most = int((self._trace.num_prompt_tokens + self._trace.num_output_tokens).max())
        if most > worker.num_blocks * worker.block_size_tokens:
            raise WorkloadError(
                f"the longest request of {self._trace.name} has {most} tokens, a worker holds "
                f"{worker.num_blocks} blocks of {worker.block_size_tokens}"
            )

    # ── time ─────────────────────────────────────────────────────────────────────────────────

    def run(self) -> ReplayResult:
        started_s = process_time()
        heap = self._heap
        arrivals = self._first_arrivals()
        num_arrived = 0
        while heap or num_arrived < len(arrivals):
            if num_arrived < len(arrivals) and (
                not heap or self._requests[arrivals[num_arrived]].arrival_s <= heap[0][0]
            ):
                request = self._requests[arrivals[num_arrived]]
                num_arrived += 1
                self._now_s = request.arrival_s
                self._arrived(request)
                continue
            self._now_s, _, action, arguments = heapq.heappop(heap)
            action(*arguments)
        assert not self._queue, f"{len(self._queue)} requests wait for room that never comes"
        return result_of(self._trace, self._settings, self._requests, self._fleet, process_time() - started_s)

    def _first_arrivals(self) -> list[int]:
        """All requests, in open loop; in closed loop first turns, the others come after an answer."""
        trace = self._trace
        if not self._settings.is_closed_loop:
            return list(range(len(trace)))
        previous = trace.previous_turn.tolist() if len(trace.session_ids) else [-1] * len(trace)
        self._next_turn = {before: index for index, before in enumerate(previous) if before >= 0}
        return [index for index, before in enumerate(previous) if before < 0]

    def _at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._heap, (time_s, self._num_events, action, arguments))

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def _arrived(self, request: Request) -> None:
        self._prompts.fill(request)
        if self._fleet.index is not None:
            request.hits = self._fleet.router.known_hits(request.packed)
        self._queue.append(request)
        if len(self._queue) == 1:
            self._pump(is_fresh=True)
        if request.prefill < 0 and self._settings.queue_timeout_s is not None:
            self._at(self._now_s + self._settings.queue_timeout_s, self._expire, request)

    def _pump(self, *, is_fresh: bool = False) -> None:
        """From the head of the queue while it fits; nobody overtakes."""
        queue = self._queue
        while queue:
            if queue[0].is_expired or self._dispatch(queue[0], is_fresh=is_fresh):
                queue.popleft()
            else:
                return
            is_fresh = False

    def _expire(self, request: Request) -> None:
        if request.prefill < 0:
            request.is_expired = True
            request.hits = None
            self._ended(request)
            self._pump()  # those behind it may fit

    def _dispatch(self, request: Request, *, is_fresh: bool) -> bool:
        fleet, now_s, leg_id = self._fleet, self._now_s, request.leg_id
        facts = RequestFacts(
            num_prompt_tokens=request.num_prompt_tokens,
            num_expected_output_tokens=self._settings.expected_output_tokens,
        )
        if self._listener is not None:
            self._listener.catch_up(now_s)
        if not is_fresh and request.hits is not None:
            request.hits = fleet.router.refreshed(request.hits)
        chosen = fleet.chooser.choose(facts, request.hits, now_s)
        if chosen is None:
            return False
        computing, decode = chosen.computing, chosen.decode
        assert computing is not None and decode is not None
        committed = commit(chosen, leg_id, facts, request.hits)
        chosen.learn(fleet.router, leg_id, request.hits, now_s)
        member = fleet.by_slot[computing.slot]
        request.prefill, request.decode = member.number, fleet.by_slot[decode.slot].number
        request.is_stay = chosen.stays
        request.is_alone = committed.is_alone
        request.num_predicted_tokens = committed.num_hit_tokens
        request.num_bytes_to_move = committed.num_bytes_to_move
        request.dispatched_s = now_s
        request.hits = None
        if computing is decode:
            member.worker.add_decode(
                leg_id,
                request.num_prompt_tokens,
                request.num_output_tokens,
                request.hashes,
                now_s,
                is_kv_on_its_way=False,
                packed=request.packed,
            )
        else:
            member.worker.add_prefill(
                leg_id, request.num_prompt_tokens, request.hashes, now_s, keep_kv=True, packed=request.packed
            )
        self._kick(member)
        return True

    def _ended(self, request: Request) -> None:
        self._num_finished += 1
        request.packed, request.hashes = b"", []
        if self._on_finished is not None:
            self._on_finished(self._num_finished)
        follower = self._next_turn.get(request.index)
        if follower is not None:
            following = self._requests[follower]
            following.arrival_s = self._now_s + float(self._trace.think_s[follower])
            self._at(following.arrival_s, self._arrived, following)

    # ── workers ──────────────────────────────────────────────────────────────────────────────

    def _kick(self, member: Member) -> None:
        """Something for it has come: begin a step, or end a long row of them with the step in progress."""
        worker = member.worker
        if worker.plan is None:
            # Not yet: whatever else comes at this very moment shares the step.
            if not member.is_beginning:
                member.is_beginning = True
                self._at(self._now_s, self._begin_idle, member)
        elif worker.plan.num_steps > 1:
            end_s = worker.cut(self._now_s)
            member.version += 1
            self._at(end_s, self._step_ended, member, member.version)

    def _begin_idle(self, member: Member) -> None:
        member.is_beginning = False
        if member.worker.plan is None:
            self._begin(member)

    def _begin(self, member: Member) -> None:
        worker = member.worker
        plan = worker.begin_step(self._now_s, _MAX_STEPS)
        for fetch in worker.places.take_fetches():
            link = self._settings.swap_link if fetch.is_swap else self._settings.link
            assert link is not None
            transfer_s = link.transfer_s(fetch.num_tokens * self._settings.kv_bytes_per_token)
            self._at(self._now_s + transfer_s, self._kv_arrived, member, fetch.leg_id)
        if plan is not None:
            member.version += 1
            self._at(plan.end_s, self._step_ended, member, member.version)

    def _kv_arrived(self, member: Member, leg_id: str) -> None:
        request = self._requests[int(leg_id)]
        self._release_source(request)
        member.worker.places.kv_arrived(leg_id)
        self._kick(member)

    def _release_source(self, request: Request) -> None:
        source = self._fleet.members[request.prefill]
        source.worker.places.release(request.leg_id)
        if self._listener is None:  # who listens hears of it with the first token
            source.account.release(request.leg_id)

    def _step_ended(self, member: Member, version: int) -> None:
        if version != member.version:
            return
        plan = member.worker.plan
        assert plan is not None
        result = member.worker.end_step()
        self._report(member, result)
        requests, now_s = self._requests, self._now_s
        if self._listener is not None and result.tokens:
            with_tokens = [leg_id for leg_id, _ in result.tokens]
            self._listener.ended(member, plan, with_tokens, result.first_tokens)
        for finished in result.finished_prefills:
            self._prefill_finished(member, requests[int(finished.leg_id)], finished)
        for leg_id in result.first_tokens:
            request = requests[int(leg_id)]
            if not request.first_token_s:
                request.first_token_s = result.first_end_s
                if request.prefill == request.decode:
                    member.account.prefill_done(leg_id)
                    self._fleet.router.leg_ended(leg_id)
        for finished in result.finished:
            request = requests[int(finished.leg_id)]
            request.finished_s = now_s
            if request.prefill == request.decode:
                request.num_cached_tokens = finished.num_cached_tokens
            member.account.release(finished.leg_id)
            self._ended(request)
        self._begin(member)
        if self._queue:
            self._pump()

    def _report(self, member: Member, result: StepResult) -> None:
        is_followed = self._listener is not None and bool(result.tokens)
        if not (result.events or result.num_prefill_tokens or is_followed):
            return
        sequence = member.num_batches
        if result.events:
            member.num_batches += 1
        report = (member, sequence, result.events, member.worker.load())
        if self._settings.report_delay_s:
            self._at(self._now_s + self._settings.report_delay_s, self._heard_late, *report)
        else:
            self._fleet.heard(*report)

    def _heard_late(self, *report: Any) -> None:
        self._fleet.heard(*report)
        self._pump()  # progress makes room in a window

    def _prefill_finished(self, member: Member, request: Request, finished: FinishedLeg) -> None:
        leg_id, now_s, num_cached_tokens = request.leg_id, self._now_s, finished.num_cached_tokens
        request.num_cached_tokens = num_cached_tokens
        request.prefilled_s = now_s
        account, pace = member.account, self._fleet.pace
        if pace is not None and request.is_alone:
            num_new_tokens = request.num_prompt_tokens - num_cached_tokens
            pace.prefilled(num_new_tokens, num_cached_tokens, now_s - finished.first_step_s)
        account.correct(leg_id, num_uncached_tokens=request.num_prompt_tokens - num_cached_tokens)
        account.prefill_done(leg_id)
        self._fleet.router.leg_ended(leg_id)
        num_given = 1 if self._settings.first_token_by == "prefill" else 0
        if num_given:
            request.first_token_s = now_s
        decode = self._fleet.members[request.decode]
        if request.num_output_tokens == num_given:
            request.finished_s = now_s
            self._release_source(request)
            account.release(leg_id)
            decode.account.release(leg_id)
            self._ended(request)
            return
        is_free = self._settings.link is None
        packed = b""
        if decode.has_events:
            packed = self._prompts.with_first_token(request) if num_given else request.packed
        decode.worker.add_decode(
            leg_id,
            request.num_prompt_tokens + num_given,
            request.num_output_tokens - num_given,
            request.hashes,
            now_s,
            is_kv_on_its_way=not is_free,
            is_kv_here=is_free,
            packed=packed,
        )
        request.packed = b""
        if is_free:
            self._release_source(request)
        self._kick(decode)
