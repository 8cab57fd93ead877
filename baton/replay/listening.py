"""What a coordinator hears of decode steps, and what it makes of it: the accounts grow, the pace is learnt.

An engine tells of every step. Here hundreds of steps are one event, so the coordinator is brought up to
date whenever it is about to decide: with the steps that have ended by then, in the order in which
they would have been heard, worker by worker. Nothing of this happens where stay or go is no question.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from baton.policy.fleet_pace import FleetPace
from baton.replay.fleet import Fleet, Member
from baton.replay.requests import Request
from baton.simulation import PlannedStep


class Listener:
    def __init__(self, fleet: Fleet, pace: FleetPace, requests: Sequence[Request], *, is_late: bool) -> None:
        """`is_late`: a worker's load is heard with its reports, and only then."""
        self._fleet = fleet
        self._pace = pace
        self._requests = requests
        self._is_late = is_late

    def catch_up(self, now_s: float) -> None:
        """With rows of steps in progress, up to now. Of a single step nothing is heard before its end."""
        for member in self._fleet.followed:
            worker = member.worker
            plan = worker.plan
            if plan is None or plan.num_steps == 1:
                continue
            num_ended = plan.num_ended(now_s)
            if num_ended > member.num_heard:
                if not self._is_late:
                    member.account.observe(worker.load())
                legs = worker.decoding
                first = [leg.leg_id for leg in legs if not leg.num_outputs_done]
                self._hear(member, plan, num_ended, [leg.leg_id for leg in legs], first)

    def ended(
        self, member: Member, plan: PlannedStep, leg_ids: Sequence[str], first_tokens: Iterable[str]
    ) -> None:
        """All steps of `plan`; its report has been heard. `leg_ids`: with new tokens."""
        self._hear(member, plan, plan.num_steps, leg_ids, first_tokens)
        member.num_heard = 0

    def _hear(
        self,
        member: Member,
        plan: PlannedStep,
        num_ended: int,
        leg_ids: Sequence[str],
        first_tokens: Iterable[str],
    ) -> None:
        account, num_heard = member.account, member.num_heard
        self._pace.heard_row(
            member.step_clock,
            account,
            len(leg_ids),
            num_ended - num_heard,
            lambda n: plan.step_end_s(num_heard + n),
        )
        if not num_heard:
            for leg_id in first_tokens:
                request = self._requests[int(leg_id)]
                if request.prefill != request.decode:
                    handoff_s = plan.step_end_s(1) - request.prefilled_s
                    self._pace.handed_over(request.num_bytes_to_move, handoff_s)
                    self._fleet.members[request.prefill].account.release(leg_id)
        for leg_id in leg_ids:
            account.grow(leg_id, num_ended - num_heard)
        member.num_heard = num_ended
