"""The coordinator's decisions: events in, actions out, no I/O.

Every accepted request is in `_requests` until its one Finish action. What is done for it between the
two is an attempt (`attempts.py`); what follows when one fails is one rule (`recovery.py`).

    submit ─> line ─> StartPrefill ─> PrefillFinished ─> StartDecode ─> tokens ─> Finish
               ^            │                                │             │
               └── retry ───┘          recompute on decode ──┘    resume ──┘
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

from baton.contract.errors import (
    Aborted,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    PhaseTimeout,
    PromptTooLong,
    QueueFull,
    ServingError,
    TransferFailed,
    WorkerLost,
    error_from_report,
)
from baton.contract.lifecycle import Outcome, RequestState, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    Heartbeat,
    KvEvents,
    LegFailed,
    NoMoreLegs,
    PrefillFinished,
    RegisterWorker,
    SequenceDelta,
    StepOutputs,
)
from baton.policy.base import Policy
from baton.policy.fleet_pace import FleetPace
from baton.policy.ledger import WorkerAccount
from baton.policy.stay_or_go import Pace
from baton.telemetry import event
from coordinator.actions import Action, Deliver, Finish, Send
from coordinator.admission import check_acceptable, check_deadline
from coordinator.attempts import Attempts
from coordinator.dispatch import BadPair, Dispatch
from coordinator.first_token import is_usable, without_repeated
from coordinator.fleet import FleetView, Worker
from coordinator.intake import FleetFacts, ResultSink, Submission
from coordinator.joining import JoinTests
from coordinator.legs import with_lease_left
from coordinator.prefixes import FleetPrefixes
from coordinator.recovery import RecoveryPolicy, give_back, is_failed_handoff, remedy_for, waited_in_vain
from coordinator.request import Request, final_report
from coordinator.waiting_line import WaitingLine

logger = logging.getLogger("baton.coordinator")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    max_queued: int = 4096
    """Requests waiting for a worker; beyond it a client hears 429 at once."""
    max_attempts: int = 3
    """In a row without progress, see `recovery`."""
    decode_loss_policy: Literal["resume", "fail"] = "resume"
    transfer_failure_policy: Literal["recompute", "fail"] = "recompute"
    queue_timeout_s: float = 120.0
    prefill_timeout_s: float = 300.0
    handoff_timeout_s: float = 20.0
    """Decode told to start → its first token. Shorter than the 30 s lease of the KV it waits for."""
    decode_stall_timeout_s: float = 60.0
    """Longest silence between two tokens."""
    expected_output_tokens: int = 256
    """Growth reserved for a request that asks for more; the engine preempts if it was too little."""
    kv_index_bytes: int = 2 * 1024**3
    """Most memory for the index of who holds which prefix; beyond it the least used is forgotten."""
    pace: Pace | None = None
    """For stay or go; None: learnt from what workers report."""
    keeps_records: bool = False
    """Each request's decisions are handed out with its end, with all facts; for a log."""
    tests_joins: bool = False
    """A worker gets no request before a prompt over it and another worker was answered right."""


class Core:
    def __init__(
        self,
        settings: CoreSettings,
        prefill_policy: Policy,
        decode_policy: Policy,
        boot_id: str,
    ) -> None:
        self.fleet = FleetView()
        self.is_draining = False
        self.num_discarded_tokens = 0
        """Generated and sent to nobody: their request was over, or they were known already."""
        self._settings = settings
        self._dispatch = Dispatch(
            self.fleet,
            prefill_policy,
            decode_policy,
            expected_output_tokens=settings.expected_output_tokens,
            kv_index_bytes=settings.kv_index_bytes,
            keeps_records=settings.keeps_records,
            pace=settings.pace,
        )
        self._join_tests = JoinTests(self.fleet, boot_id)
        self._attempts = Attempts(
            self.fleet,
            self._dispatch,
            boot_id,
            stream_lease_s=settings.prefill_timeout_s + settings.handoff_timeout_s,
        )
        self._recovery = RecoveryPolicy(
            max_attempts=settings.max_attempts,
            transfer_failure_policy=settings.transfer_failure_policy,
            decode_loss_policy=settings.decode_loss_policy,
        )
        self._line = WaitingLine()
        self._requests: dict[str, Request] = {}
        self._facts_key = (-1, False)
        self._facts: FleetFacts

    # ── facts ────────────────────────────────────────────────────────────────────────────────

    @property
    def num_requests(self) -> int:
        """Accepted and not finished."""
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        return len(self._line)

    @property
    def pace(self) -> FleetPace:
        return self._dispatch.pace

    def bad_pairs(self, now_s: float) -> Iterable[BadPair]:
        """Of prefill and decode worker."""
        return self._dispatch.bad_pairs(now_s)

    @property
    def prefixes(self) -> FleetPrefixes:
        return self._dispatch.prefixes

    def facts(self) -> FleetFacts:
        key = (self.fleet.num_changes, self.is_draining)
        if key != self._facts_key:
            layout = self.fleet.layout
            self._facts_key = key
            self._facts = FleetFacts(
                is_ready=self.fleet.has_pair and not self.is_draining,
                why_not_ready=self.fleet.why_not_ready(),
                model=layout.model if layout else None,
                max_model_len=self.fleet.max_model_len,
            )
        return self._facts

    # ── clients ──────────────────────────────────────────────────────────────────────────────

    def submit(self, submission: Submission, sink: ResultSink, now_s: float) -> list[Action]:
        """Raises ServingError and accepts nothing; see `Intake.submit`."""
        request = Request(submission, sink, now_s)
        check_acceptable(
            request, self.fleet, is_draining=self.is_draining, is_known=request.request_id in self._requests
        )
        if len(self._line) >= self._settings.max_queued:
            raise QueueFull(
                f"{len(self._line)} requests are queued, the limit is {self._settings.max_queued}",
                retry_after_s=self._line.retry_after_s(now_s),
            )
        if request.deadline_s is not None:
            service_s = self._dispatch.least_service_s(request)
            check_deadline(request.deadline_s - now_s, self._line, service_s, now_s)
        self._requests[request.request_id] = request
        self._line.join(request)
        event(
            logger, "request accepted", request_id=request.request_id,
            num_prompt_tokens=request.num_prompt_tokens, max_tokens=submission.sampling.max_tokens,
        )  # fmt: skip
        return self._pump(now_s)

    def abort(self, request_id: str, now_s: float) -> list[Action]:
        request = self._requests.get(request_id)
        if request is None:
            return []
        actions = self._finish(request, Outcome.ABORTED, now_s, error=Aborted("the client left"))
        return actions + self._pump(now_s)

    def sink_broke(self, sink: ResultSink, error: ServingError, now_s: float) -> list[Action]:
        """It did not take a token: its request must not go on as if it had. Looks for it among all."""
        request = next((one for one in self._requests.values() if one.sink is sink), None)
        if request is None:
            return []
        return self._finish(request, Outcome.FAILED, now_s, error=error) + self._pump(now_s)

    # ── workers ──────────────────────────────────────────────────────────────────────────────

    def worker_registered(self, registration: RegisterWorker, peer: bytes, now_s: float) -> list[Action]:
        """Call after `fleet.check`. A worker that registers again has forgotten its legs."""
        actions = []
        if self.fleet.get(registration.worker_id) is not None:
            actions = self.worker_lost(registration.worker_id, "it registered again", now_s)
        worker = self.fleet.add(registration, peer, now_s)
        self._dispatch.worker_joined(worker)
        if self._settings.tests_joins:
            actions += self._join_tests.joined(worker, now_s)
        return actions + self._pump(now_s)

    def worker_lost(self, worker_id: str, reason: str, now_s: float) -> list[Action]:
        """Its legs are gone; every request that depended on one is retried or failed by name."""
        worker = self.fleet.remove(worker_id)
        if worker is None:
            return []
        self._dispatch.worker_left(worker)
        actions = self._join_tests.lost(worker, now_s)
        for request in reversed(list(self._requests.values())):  # each goes to the head of the line
            if worker_id in (request.decode_worker, request.prefill_worker):
                error = WorkerLost(
                    f"worker {worker_id} was lost in {request.state.value}: {reason}",
                    phase=request.state.value,
                    worker_id=worker_id,
                )
                actions += self._attempt_failed(request, error, worker_id, now_s)
        return actions + self._pump(now_s)

    def worker_leaving(self, worker: Worker) -> list[Action]:
        self.fleet.mark_leaving(worker)
        return self._dismiss(worker)

    def _dismiss(self, worker: Worker) -> list[Action]:
        """It may go once nothing is planned with it: a prompt may be on its way to it from elsewhere."""
        if not worker.is_leaving or worker.is_dismissed or worker.account.num_legs:
            return []
        worker.is_dismissed = True
        return [Send(worker.worker_id, NoMoreLegs())]

    def heartbeat(self, worker: Worker, message: Heartbeat, now_s: float) -> list[Action]:
        worker.hear_clock(message.sent_s, now_s)
        return self._pump(now_s) if worker.account.observe(message.load) else []

    def prefill_finished(self, worker: Worker, message: PrefillFinished, now_s: float) -> list[Action]:
        worker.account.observe(message.load)
        delta = message.delta
        if self._join_tests.knows(delta.handoff_id, worker):
            return self._join_tests.prefilled(message, now_s)
        request = self._leg(delta.handoff_id, worker, RequestState.PREFILLING)
        if request is None:
            # Nobody will fetch this KV: let the worker free it now instead of at the lease's end.
            self.num_discarded_tokens += len(delta.token_ids)
            return [Send(worker.worker_id, AbortLeg(handoff_id=delta.handoff_id))]
        self._attempts.prompt_computed(request, worker, message, now_s)
        is_last = delta.finish_reason is not None or not request.needs_decode
        if request.next_token_by is WorkerRole.PREFILL and not (is_last or is_usable(delta)):
            request.choose_next_token(WorkerRole.DECODE, "partial character")
        is_token_given = request.next_token_by is WorkerRole.PREFILL
        if not is_token_given:
            self.num_discarded_tokens += len(delta.token_ids)
        actions: list[Action] = []
        if is_token_given:
            request.output_token_ids.extend(delta.token_ids)
            request.update_placement()
            actions.append(Deliver(request.sink, delta, request.placement))
            if is_last:
                actions += self._finish(request, Outcome.COMPLETED, now_s, last=delta)
                return actions + self._pump(now_s)
        request.move(RequestState.HANDING_OFF, now_s)
        if not request.is_streamed:
            source = with_lease_left(request, message, now_s)
            actions.append(self._attempts.start_decode(request, source, now_s))
        else:  # the decode worker has known of the prompt since the prefill began
            request.given_delta = delta if is_token_given else None
            early, request.early_deltas = request.early_deltas, []
            decode = self.fleet.get(request.decode_worker or "")
            if early and decode is not None:
                actions += self._decoded(decode, early, now_s)[0]
        return actions + self._pump(now_s)

    def step(self, worker: Worker, message: StepOutputs, now_s: float) -> list[Action]:
        """The hot path: one call per engine step of a decode worker."""
        is_room_freed = worker.account.observe(message.load)
        self.pace.heard_step(worker.step_clock, worker.account, len(message.deltas), now_s)
        actions, has_freed_room = self._decoded(worker, message.deltas, now_s)
        return actions + self._pump(now_s) if is_room_freed or has_freed_room else actions

    def _decoded(
        self, worker: Worker, deltas: list[SequenceDelta], now_s: float
    ) -> tuple[list[Action], bool]:
        """True: there is room for others now."""
        actions: list[Action] = []
        account, is_room_freed = worker.account, False
        legs = self._attempts.legs
        for delta in deltas:
            request = legs.get(delta.handoff_id)
            if request is None or request.decode_worker != worker.worker_id or request.is_prefilled_elsewhere:
                if self._join_tests.knows(delta.handoff_id, worker):
                    actions += self._join_tests.decoded(delta, now_s)
                    is_room_freed = True
                else:
                    self._log_dropped("delta", delta.handoff_id, worker)
                    self.num_discarded_tokens += len(delta.token_ids)
                continue
            if request.is_streamed and request.state is RequestState.PREFILLING:
                # The prefill worker's word is on its way, with the first token and what is known of hits.
                request.early_deltas.append(delta)
                continue
            if request.given_delta is not None:
                given, request.given_delta = request.given_delta, None
                rest = without_repeated(delta, given)
                num_kept = 0 if rest is None else len(rest.token_ids)
                self.num_discarded_tokens += len(delta.token_ids) - num_kept
                if rest is None:
                    error = _other_first_token(delta, given, worker)
                    actions += self._attempt_failed(request, error, worker.worker_id, now_s)
                    is_room_freed = True
                    continue
                if not rest.token_ids and rest.finish_reason is None:
                    request.progress_s = now_s  # its first token of its own is still to come
                    if rest.has_lost_kv:
                        self._attempts.first_decoded(request, rest, now_s)
                    continue
                delta = rest
            if request.state is not RequestState.DECODING:
                actions += self._attempts.first_decoded(request, delta, now_s)
            num_tokens = len(delta.token_ids)
            request.output_token_ids.extend(delta.token_ids)
            request.progress_s = now_s
            account.grow(delta.handoff_id, num_tokens)
            actions.append(Deliver(request.sink, delta, request.placement))
            if delta.finish_reason is not None:
                if delta.num_cached_tokens is not None:
                    request.found_hits(delta.num_cached_tokens)
                    request.update_placement()
                actions += self._finish(request, Outcome.COMPLETED, now_s, last=delta)
                is_room_freed = True
        return actions, is_room_freed

    def kv_events(self, worker: Worker, message: KvEvents, now_s: float) -> list[Action]:
        """Prefill progress comes with them, step by step."""
        is_room_freed = worker.account.observe(message.load)
        ask = self.prefixes.received(worker, message)
        actions: list[Action] = [] if ask is None else [Send(worker.worker_id, ask)]
        return actions + self._pump(now_s) if is_room_freed else actions

    def leg_failed(self, worker: Worker, message: LegFailed, now_s: float) -> list[Action]:
        if self._join_tests.knows(message.handoff_id, worker):
            return self._join_tests.failed(message, now_s) + self._pump(now_s)
        request = self._attempts.legs.get(message.handoff_id)
        if request is None or worker.worker_id not in (request.prefill_worker, request.decode_worker):
            self._log_dropped("failure", message.handoff_id, worker)
            return []
        phase, report = request.state.value, message.error
        if report.code == Aborted.code:  # not by us: then this leg would be unknown
            report = WorkerLost(f"worker {worker.worker_id} gave the request up: {report.message}").report()
        elif report.code == PromptTooLong.code:  # for a worker that joined after the request was accepted
            report = EngineFailed(report.message).report()
        report = msgspec.structs.replace(
            report, phase=report.phase or phase, worker_id=report.worker_id or worker.worker_id
        )
        actions = self._attempt_failed(request, error_from_report(report), worker.worker_id, now_s)
        return actions + self._pump(now_s)

    # ── time ─────────────────────────────────────────────────────────────────────────────────

    def tick(self, now_s: float) -> list[Action]:
        """Ends every phase that made no progress within its deadline. Call a few times a second."""
        self.prefixes.settle_due(now_s)
        actions = self._join_tests.tick(now_s)
        for worker in self.fleet:
            actions += self._dismiss(worker)
        for request in list(self._requests.values()):
            if request.is_late(now_s):
                actions += self._finish_late(request, now_s)
                continue
            limit_s = self._phase_limit_s(request.state)
            if now_s - request.progress_s <= limit_s:
                continue
            is_prefill = request.state is RequestState.PREFILLING
            worker_id = (request.prefill_worker if is_prefill else None) or request.decode_worker
            error = waited_in_vain(request, limit_s, worker_id)
            if request.state is RequestState.QUEUED:
                actions += self._finish(request, Outcome.EXPIRED, now_s, error=error)
            else:
                actions += self._attempt_failed(request, error, worker_id, now_s)
        return actions + self._pump(now_s)

    def abort_all(self, reason: str, now_s: float) -> list[Action]:
        """For shutdown: every request hears its end."""
        actions: list[Action] = []
        for request in list(self._requests.values()):
            actions += self._finish(request, Outcome.ABORTED, now_s, error=Draining(reason))
        return actions

    def _phase_limit_s(self, state: RequestState) -> float:
        s = self._settings
        return {
            RequestState.QUEUED: s.queue_timeout_s,
            RequestState.PREFILLING: s.prefill_timeout_s,
            RequestState.HANDING_OFF: s.handoff_timeout_s,
            RequestState.DECODING: s.decode_stall_timeout_s,
        }[state]

    # ── dispatch ─────────────────────────────────────────────────────────────────────────────

    def _pump(self, now_s: float) -> list[Action]:
        """Dispatch from the head of the line while it fits; nobody overtakes."""
        actions: list[Action] = []
        line = self._line
        while line:
            request = line.head
            if request.deadline_s is not None:
                # Asked again before its prefill is paid: it may have waited for longer than expected.
                need_s = self._dispatch.least_service_s(request)
                if request.is_late(now_s + need_s):
                    actions += self._finish_late(request, now_s, need_s)
                    continue
            dispatched = self._attempts.begin(request, now_s)
            if dispatched is None:
                break
            line.depart(request, now_s)
            actions += dispatched
        line.settle(now_s)
        return actions

    def _finish_late(self, request: Request, now_s: float, need_s: float = 0.0) -> list[Action]:
        waited_s = now_s - request.submitted_s
        more = f" and the work would take {need_s:.3g} s" if need_s else ""
        error = DeadlineExceeded(
            f"the deadline passed in line: {waited_s:.3g} s waited{more}", phase=request.state.value
        )
        return self._finish(request, Outcome.EXPIRED, now_s, error=error)

    # ── endings ──────────────────────────────────────────────────────────────────────────────

    def _attempt_failed(
        self, request: Request, error: ServingError, worker_id: str | None, now_s: float
    ) -> list[Action]:
        """Another attempt, or the end. `worker_id`: whose failure it is, if that is known."""
        if is_failed_handoff(request, error):
            assert request.prefill_worker is not None and request.decode_worker is not None
            self._dispatch.handoff_failed(request.prefill_worker, request.decode_worker, now_s)
        remedy = remedy_for(request, error, worker_id, self._recovery)
        if isinstance(remedy, ServingError):
            outcome = Outcome.EXPIRED if isinstance(error, PhaseTimeout) else Outcome.FAILED
            return self._finish(request, outcome, now_s, error=remedy)
        logger.warning(
            "attempt failed request_id=%s handoff_id=%s state=%s code=%s worker_id=%s retry=%s "
            "num_output_tokens=%d message=%r",
            request.request_id, request.handoff_id, request.state.value, error.code, worker_id, remedy.value,
            request.num_output_tokens, error.message,
        )  # fmt: skip
        self._discard_early(request)
        give_back(request, remedy, error, worker_id)
        actions = self._attempts.close(request)
        request.move(RequestState.QUEUED, now_s)
        self._line.put_first(request)
        return actions

    def _finish(
        self,
        request: Request,
        outcome: Outcome,
        now_s: float,
        *,
        last: SequenceDelta | None = None,
        error: ServingError | None = None,
    ) -> list[Action]:
        self._discard_early(request)
        is_well = outcome is Outcome.COMPLETED
        phase = None if is_well else request.state.value
        actions = self._attempts.complete(request) if is_well else self._attempts.close(request)
        self._line.leave(request)
        request.move(RequestState.FINISHED, now_s)
        del self._requests[request.request_id]
        actions.append(
            Finish(request.sink, request.request_id, request.handoff_id,
                   final_report(request, outcome, now_s, last, error, phase), now_s - request.submitted_s,
                   request.records)
        )  # fmt: skip
        return actions

    def _discard_early(self, request: Request) -> None:
        self.num_discarded_tokens += sum(len(delta.token_ids) for delta in request.early_deltas)
        request.early_deltas = []

    def _leg(self, handoff_id: str, worker: Worker, state: RequestState) -> Request | None:
        request = self._attempts.legs.get(handoff_id)
        if request is None or request.prefill_worker != worker.worker_id or request.state is not state:
            self._log_dropped("prefill result", handoff_id, worker)
            return None
        return request

    @staticmethod
    def _log_dropped(what: str, handoff_id: str, worker: Worker) -> None:
        logger.info(
            "late message dropped what=%s handoff_id=%s worker_id=%s", what, handoff_id, worker.worker_id
        )

    def check_idle(self) -> Iterable[WorkerAccount]:
        """Accounts that are not zero although no request is in flight: always empty."""
        if self._requests:
            return []
        return [w.account for w in self.fleet if w.account.num_legs or w.account.num_reserved_blocks]


def _other_first_token(delta: SequenceDelta, given: SequenceDelta, worker: Worker) -> TransferFailed:
    return TransferFailed(
        f"the answer began with token {given.token_ids}, the decode worker with {delta.token_ids[:1]}: "
        "it did not get the prefill worker's",
        phase=RequestState.HANDING_OFF.value,
        worker_id=worker.worker_id,
    )
