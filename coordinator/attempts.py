"""Attempts to serve a request: who is told to start what, and to stop it. No I/O.

Each attempt has a `handoff_id`; `legs` maps the live ones, so whatever a worker says about an abandoned
attempt finds nobody and is dropped. Room on the decode worker is reserved before prefill is dispatched:
KV that nobody can take would fill the prefill worker.
"""

from __future__ import annotations

import logging

from baton.contract.lifecycle import RequestState
from baton.contract.messages import AbortLeg, KvSource, PrefillFinished, SequenceDelta
from baton.telemetry import event
from coordinator.actions import Action, Send
from coordinator.dispatch import Dispatch
from coordinator.fleet import FleetView, Worker
from coordinator.legs import reason_to_pull, start_decode, start_prefill, stream_source
from coordinator.request import Request

logger = logging.getLogger("baton.coordinator")


class Attempts:
    def __init__(self, fleet: FleetView, dispatch: Dispatch, boot_id: str, *, stream_lease_s: float) -> None:
        """`stream_lease_s`: how long a decode worker's reservation for a stream may stand."""
        self.legs: dict[str, Request] = {}
        self._fleet = fleet
        self._dispatch = dispatch
        self._boot_id = boot_id
        self._stream_lease_s = stream_lease_s
        self._num_handoffs = 0

    def begin(self, request: Request, now_s: float) -> list[Action] | None:
        """None: no worker has room; nothing changed."""
        handoff_id = f"h{self._boot_id}-{self._num_handoffs + 1:x}"
        assignment = self._dispatch.assign(request, handoff_id, now_s)
        if assignment is None:
            return None
        self._num_handoffs += 1
        self.legs[handoff_id] = request
        prefill, decode = assignment.prefill, assignment.decode
        stream, pull_reason = None, None
        if prefill is not None and decode is not None and prefill is not decode:
            stream, pull_reason = self._transfer(request, prefill.worker_id, decode.worker_id)
        request.begin_attempt(
            handoff_id,
            now_s,
            prefill_worker=None if prefill is None else prefill.worker_id,
            decode_worker=None if decode is None else decode.worker_id,
            way=assignment.way,
            way_reason=assignment.reason,
            stream=stream,
            pull_reason=pull_reason,
        )
        event(
            logger, "attempt started", request_id=request.request_id, handoff_id=handoff_id,
            prefill_worker=request.prefill_worker, decode_worker=request.decode_worker,
            way=assignment.way.value, transfer=request.transfer and request.transfer.value,
            pull_reason=request.pull_reason, num_given_tokens=request.num_given_tokens or None,
        )  # fmt: skip
        if assignment.record is not None:
            request.records.append(assignment.record)
        if prefill is None:
            request.move(RequestState.HANDING_OFF, now_s)
            return [self.start_decode(request, None, now_s)]
        request.move(RequestState.PREFILLING, now_s)
        if prefill is decode:
            return [self.start_decode(request, None, now_s)]
        actions: list[Action] = [Send(prefill.worker_id, start_prefill(request, now_s))]
        if stream is not None:
            actions.append(self.start_decode(request, stream, now_s))
        return actions

    def _transfer(
        self, request: Request, prefill_id: str, decode_id: str
    ) -> tuple[KvSource | None, str | None]:
        """(what the decode worker is told when the prefill begins, or None, why it is told later)"""
        prefill, decode = self._fleet.get(prefill_id), self._fleet.get(decode_id)
        assert prefill is not None and decode is not None, "both have just been chosen"
        account = prefill.account
        reason = reason_to_pull(request, prefill.registration, decode.registration)
        if reason is None and account.num_reserved_blocks > account.capacity.num_blocks:
            # It might begin prompts in another order than that in which the decode worker promises blocks,
            # and each would wait for the other: nothing is promised for what may not fit here beside the
            # others. It is pulled when it is there.
            reason = "the prefill worker has promised more blocks than it has"
        if reason is not None:
            return None, reason
        return stream_source(request, prefill.registration, decode.registration, self._stream_lease_s), None

    def start_decode(self, request: Request, kv_source: KvSource | None, now_s: float) -> Send:
        assert request.decode_worker is not None
        worker = self._fleet.get(request.decode_worker)
        sent_s = worker.clock_s(now_s) if worker is not None else None
        request.kv_source = kv_source
        return Send(request.decode_worker, start_decode(request, kv_source, sent_s, now_s))

    # ── what its workers say ─────────────────────────────────────────────────────────────────

    def prompt_computed(
        self, request: Request, worker: Worker, message: PrefillFinished, now_s: float
    ) -> None:
        delta = message.delta
        if delta.num_cached_tokens is not None:
            num_uncached_tokens = request.num_leg_tokens - delta.num_cached_tokens
            worker.account.correct(delta.handoff_id, num_uncached_tokens=num_uncached_tokens)
            if request.is_alone:
                self._dispatch.pace.prefilled(num_uncached_tokens, delta.num_cached_tokens, message.prefill_s)
        self._dispatch.prompt_computed(worker, delta.handoff_id, now_s)
        request.prompt_computed(now_s, delta.num_cached_tokens)
        request.found_hits(delta.num_cached_tokens)
        request.prompt_logprobs = message.prompt_logprobs or request.prompt_logprobs

    def first_decoded(self, request: Request, delta: SequenceDelta, now_s: float) -> list[Action]:
        """The decode worker's first word: all before it is over."""
        source = request.prefill_worker
        if request.state is RequestState.PREFILLING:
            request.prompt_computed(now_s, delta.num_cached_tokens)  # here
            request.prompt_logprobs = delta.prompt_logprobs or request.prompt_logprobs
            worker = self._fleet.get(request.decode_worker or "")
            if worker is not None:
                self._dispatch.prompt_computed(worker, request.handoff_id, now_s)
        elif request.kv_source is None:  # computed a second time
            request.num_prefilled_tokens += request.num_leg_tokens
        if request.kv_source is not None:
            self._handed_over(request, delta, now_s)
        request.move(RequestState.DECODING, now_s)
        if request.first_decode_s is None:
            request.first_decode_s = now_s
        event(logger, "decoding", request_id=request.request_id, handoff_id=request.handoff_id,
              decode_worker=request.decode_worker)  # fmt: skip
        if source is not None:  # the KV has been read, or will not be: that worker is done with us
            self._dispatch.release(source, request.handoff_id)
            request.prefill_worker = None
        request.update_placement()
        if source is not None and delta.has_lost_kv:
            return [Send(source, AbortLeg(handoff_id=request.handoff_id))]  # it still holds it
        return []

    def _handed_over(self, request: Request, delta: SequenceDelta, now_s: float) -> None:
        """Or not: an engine whose policy is to recompute goes on without the KV, and says so."""
        assert request.kv_source is not None and request.decode_worker is not None
        source = request.prefill_worker
        if delta.has_lost_kv:
            request.num_prefilled_tokens += request.num_leg_tokens
            if source is not None:
                self._dispatch.handoff_failed(source, request.decode_worker, now_s)
            return
        request.num_bytes_moved += request.kv_source.num_bytes
        if source is not None:
            self._dispatch.handoff_succeeded(source, request.decode_worker)
        if request.prompt_computed_s is not None:
            self._dispatch.pace.handed_over(request.num_bytes_to_move, now_s - request.prompt_computed_s)

    # ── its end ──────────────────────────────────────────────────────────────────────────────

    def complete(self, request: Request) -> list[Action]:
        """The attempt ended well; its workers know, but for one."""
        self.legs.pop(request.handoff_id, None)
        for worker_id in (request.prefill_worker, request.decode_worker):
            if worker_id is not None:
                self._dispatch.release(worker_id, request.handoff_id)
        if request.is_streamed and request.decode_worker and request.state is RequestState.PREFILLING:
            # Over with the prefill worker's token; the decode worker was waiting for its KV.
            return [Send(request.decode_worker, AbortLeg(handoff_id=request.handoff_id))]
        return []

    def close(self, request: Request) -> list[Action]:
        """Take the attempt back from its workers; what they still say about it will be dropped."""
        actions: list[Action] = []
        self.legs.pop(request.handoff_id, None)
        self._dispatch.prompt_given_up(request.handoff_id)
        for worker_id in {request.prefill_worker, request.decode_worker} - {None}:
            assert worker_id is not None
            self._dispatch.release(worker_id, request.handoff_id)
            if self._fleet.get(worker_id) is not None and _has_work(request, worker_id):
                actions.append(Send(worker_id, AbortLeg(handoff_id=request.handoff_id)))
        request.prefill_worker = request.decode_worker = None
        return actions


def _has_work(request: Request, worker_id: str) -> bool:
    """A decode worker knows nothing of a request that is being prefilled elsewhere."""
    return worker_id == request.prefill_worker or not request.is_prefilled_elsewhere
