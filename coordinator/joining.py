"""Before a worker serves: one prompt over it and another worker, compared with the decode worker's own
answer. No I/O.

Layouts that agree do not make KV that means the same: other weights under one name, a setting that only
one of the two has, a transfer that says it is complete and is not. All of that answers 200 with wrong
text. So a worker that registers is *on trial*: in the fleet, and given no request, until a hand-off with
it has been seen to be right.

    waiting for a counterpart ──> handed over: P computes, D continues ──> alone: D computes all itself
         ^                                                                       │
         └── the counterpart was lost                   the same numbers: it serves; others: it is refused

The first prefill and the first decode worker try each other; whoever comes later is tried with one that
serves already. A test that could not be carried out (a failed transfer, a time-out) lets the worker in
with a warning: what fails aloud is each request's own business, this is about what fails silently. A
worker that passed says so when it registers again, here or with the next coordinator: it is the same process.

The second answer is computed with prompt logprobs, for which engines read no prefix cache: the cache has
just been filled by the KV that is in question.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from enum import Enum

import msgspec

from baton.contract.errors import EngineFailed, RegistrationRefused, ServingError, error_from_report
from baton.contract.lifecycle import PHASES, Way, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    JoinTestPassed,
    LegFailed,
    PrefillFinished,
    SequenceDelta,
    TokenLogprobs,
    WorkerRefused,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.telemetry import event
from coordinator.actions import Action, Send
from coordinator.fleet import FleetView, Worker
from coordinator.intake import Submission
from coordinator.legs import (
    reason_to_pull,
    start_decode,
    start_prefill,
    stream_source,
    with_lease_left,
)
from coordinator.request import Request
from coordinator.same_answer import NUM_ALTERNATIVES, difference

logger = logging.getLogger("baton.coordinator")

NUM_FULL_BLOCKS, NUM_EXTRA_TOKENS = 2, 5
"""Full blocks and a partial one travel."""

NUM_OUTPUT_TOKENS = 4

FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 999
"""Ordinary words in every vocabulary we know, the demo model's small one included."""

TIMEOUT_S = 30.0
"""For one test. It takes a second at most on idle workers; on busy ones it waits its turn."""

MAX_AT_ONCE = 4
"""Tests that one serving worker takes part in."""

_SPEC = SamplingSpec(
    max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, logprobs=NUM_ALTERNATIVES
)


class _NoSink:
    """Nobody waits for a test's tokens."""

    def on_delta(self, delta: object, placement: object) -> None: ...

    def on_finished(self, report: object) -> None: ...


class _Stage(Enum):
    HANDED_OVER = "handed over"
    ALONE = "alone"


class _Trial:
    """One prefill and one decode worker, of whom one or both are on trial."""

    def __init__(self, number: str, prefill: Worker, decode: Worker, now_s: float) -> None:
        self.prefill, self.decode = prefill, decode
        self.stage = _Stage.HANDED_OVER
        self.started_s = now_s
        self.handed_over: list[TokenLogprobs] = []
        self.alone: list[TokenLogprobs] = []
        self.prefill_token: int | None = None
        """Also where the decode worker samples the first token itself, as it does of a stream."""
        dice = random.Random(f"{number} {prefill.registration.boot_id} {decode.registration.boot_id}")
        length = NUM_FULL_BLOCKS * prefill.registration.layout.block_size_tokens + NUM_EXTRA_TOKENS
        room = min(w.registration.capacity.max_model_len for w in (prefill, decode)) - NUM_OUTPUT_TOKENS
        prompt = [dice.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(max(1, min(length, room)))]
        self.request = self._request(f"join-{number}", pack_token_ids(prompt), _SPEC, now_s)
        alone = msgspec.structs.replace(_SPEC, prompt_logprobs=0)
        self.alone_request = self._request(f"join-{number}-alone", pack_token_ids(prompt), alone, now_s)

    @staticmethod
    def _request(request_id: str, prompt: bytes, sampling: SamplingSpec, now_s: float) -> Request:
        submission = Submission(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)
        return Request(submission, _NoSink(), now_s)

    @property
    def leg_ids(self) -> tuple[str, str]:
        return self.request.request_id, self.alone_request.request_id

    @property
    def worker_ids(self) -> tuple[str, str]:
        return self.prefill.worker_id, self.decode.worker_id

    @property
    def on_trial(self) -> list[Worker]:
        return [worker for worker in (self.prefill, self.decode) if worker.is_on_trial]

    def begin(self, now_s: float) -> list[Action]:
        request, (source, destination) = self.request, (self.prefill, self.decode)
        pair = (source.registration, destination.registration)
        pull_reason = reason_to_pull(request, *pair)
        stream = None if pull_reason else stream_source(request, *pair, TIMEOUT_S)
        request.begin_attempt(
            request.request_id, now_s,
            prefill_worker=source.worker_id, decode_worker=destination.worker_id,
            way=Way.DISAGGREGATED, way_reason="join test", stream=stream, pull_reason=pull_reason,
        )  # fmt: skip
        actions: list[Action] = [Send(source.worker_id, start_prefill(request, now_s))]
        if stream is not None:
            order = start_decode(request, stream, destination.clock_s(now_s), now_s)
            actions.append(Send(destination.worker_id, order))
        return actions

    def prefilled(self, message: PrefillFinished, now_s: float) -> list[Action]:
        request, delta = self.request, message.delta
        self.prefill_token = delta.token_ids[0] if delta.token_ids else None
        if request.is_streamed:
            return []
        if request.next_token_by is WorkerRole.PREFILL:
            self.handed_over += delta.logprobs or []
            request.output_token_ids.extend(delta.token_ids)
        source = with_lease_left(request, message, now_s)
        order = start_decode(request, source, self.decode.clock_s(now_s), now_s)
        return [Send(self.decode.worker_id, order)]

    def decoded(self, delta: SequenceDelta, now_s: float) -> list[Action] | None:
        """None: the test is over."""
        answer = self.handed_over if self.stage is _Stage.HANDED_OVER else self.alone
        answer += delta.logprobs or []
        if delta.finish_reason is None:
            return []
        if self.stage is _Stage.ALONE:
            return None
        self.stage = _Stage.ALONE
        request = self.alone_request
        request.handoff_id = request.request_id
        order = start_decode(request, None, self.decode.clock_s(now_s), now_s)
        return [Send(self.decode.worker_id, order)]

    def difference(self) -> str | None:
        if self.prefill_token is not None and self.alone:
            likely = [entry.token_id for entry in self.alone[0]]
            if self.prefill_token not in likely:
                return f"the prefill worker's token is {self.prefill_token} instead of {likely[0]}"
        return difference(self.handed_over, self.alone)

    def stop(self) -> list[Action]:
        """Take back what may still be going on."""
        return [
            Send(name, AbortLeg(handoff_id=leg_id)) for leg_id in self.leg_ids for name in self.worker_ids
        ]


class JoinTests:
    """Which workers are on trial, and the tests that are going on."""

    def __init__(self, fleet: FleetView, boot_id: str) -> None:
        self._fleet = fleet
        self._boot_id = boot_id
        self._num_trials = 0
        self._trials: dict[str, _Trial] = {}
        """By the ids of their legs."""
        self._num_tests: Counter[str] = Counter()
        """Going on, by worker id."""

    def knows(self, handoff_id: str, worker: Worker) -> bool:
        """This worker has a leg of that name, of a test that is going on."""
        trial = self._trials.get(handoff_id)
        return trial is not None and worker in (trial.prefill, trial.decode)

    # ── workers come and go ──────────────────────────────────────────────────────────────────

    def joined(self, worker: Worker, now_s: float) -> list[Action]:
        """Call before anything is dispatched to it."""
        if not worker.registration.has_passed_join_test:
            self._fleet.put_on_trial(worker)
        return self._match(now_s)

    def lost(self, worker: Worker, now_s: float) -> list[Action]:
        """Call after it has left the fleet. Its tests begin again with somebody else."""
        actions: list[Action] = []
        for trial in self._all():
            if worker in (trial.prefill, trial.decode):
                self._forget(trial)
                actions += trial.stop()
        return actions + self._match(now_s)

    def _match(self, now_s: float) -> list[Action]:
        """Give everybody on trial a counterpart, if there is one."""
        waiting = [worker for worker in self._fleet if self._waits(worker)]
        if not waiting:
            return []
        actions: list[Action] = []
        free = [worker for worker in self._fleet if self._has_time_for_a_test(worker)]
        for worker in waiting:
            if self._waits(worker):  # nobody before it has chosen it
                actions += self._begin(worker, free, now_s)
        return actions

    def _begin(self, worker: Worker, candidates: list[Worker], now_s: float) -> list[Action]:
        free = [
            other for other in candidates if _complement(other, worker) and self._has_time_for_a_test(other)
        ]
        if not free:
            if worker.role is WorkerRole.BOTH and not any(
                _complement(other, worker) for other in self._fleet
            ):
                self._fleet.let_in(worker)  # nothing is handed over where every worker serves both phases
            return []
        other = min(free, key=lambda candidate: (candidate.is_on_trial, self._num_tests[candidate.worker_id]))
        is_source = worker.role is WorkerRole.PREFILL or other.role is WorkerRole.DECODE
        self._num_trials += 1
        pair = (worker, other) if is_source else (other, worker)
        trial = _Trial(f"{self._boot_id}-{self._num_trials}", *pair, now_s)
        for leg_id in trial.leg_ids:
            self._trials[leg_id] = trial
        self._num_tests.update(trial.worker_ids)
        return trial.begin(now_s)

    def _waits(self, worker: Worker) -> bool:
        return worker.is_on_trial and worker.can_be_used and not self._num_tests[worker.worker_id]

    def _has_time_for_a_test(self, worker: Worker) -> bool:
        most = 1 if worker.is_on_trial else MAX_AT_ONCE
        return worker.can_be_used and self._num_tests[worker.worker_id] < most

    def _forget(self, trial: _Trial) -> None:
        for leg_id in trial.leg_ids:
            del self._trials[leg_id]
        self._num_tests -= Counter(trial.worker_ids)

    def _all(self) -> list[_Trial]:
        return list(dict.fromkeys(self._trials.values()))

    # ── what the workers say ─────────────────────────────────────────────────────────────────

    def prefilled(self, message: PrefillFinished, now_s: float) -> list[Action]:
        return self._trials[message.delta.handoff_id].prefilled(message, now_s)

    def decoded(self, delta: SequenceDelta, now_s: float) -> list[Action]:
        trial = self._trials[delta.handoff_id]
        actions = trial.decoded(delta, now_s)
        if actions is not None:
            return actions
        self._forget(trial)
        found = trial.difference()
        if found is None:
            event(logger, "join test passed", prefill=trial.prefill.worker_id,
                  decode=trial.decode.worker_id, took_s=now_s - trial.started_s)  # fmt: skip
            passed: list[Action] = [Send(worker.worker_id, JoinTestPassed()) for worker in trial.on_trial]
            self._let_in(trial.on_trial)
            return passed + self._match(now_s)
        return self._refuse(trial, found) + self._match(now_s)

    def failed(self, message: LegFailed, now_s: float) -> list[Action]:
        return self._inconclusive(self._trials[message.handoff_id], error_from_report(message.error), now_s)

    def tick(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        for trial in self._all():
            if now_s - trial.started_s > TIMEOUT_S:
                error = EngineFailed(f"it was not over after {TIMEOUT_S:g} s")
                actions += self._inconclusive(trial, error, now_s)
        return actions

    # ── how a test ends ──────────────────────────────────────────────────────────────────────

    def _inconclusive(self, trial: _Trial, error: ServingError, now_s: float) -> list[Action]:
        event(
            logger, "join test not carried out", level=logging.WARNING, prefill=trial.prefill.worker_id,
            decode=trial.decode.worker_id, stage=trial.stage.value, reason=error.message,
        )  # fmt: skip
        self._forget(trial)
        self._let_in(trial.on_trial)
        return trial.stop() + self._match(now_s)

    def _let_in(self, workers: list[Worker]) -> None:
        for worker in workers:
            self._fleet.let_in(worker)

    def _refuse(self, trial: _Trial, found: str) -> list[Action]:
        """The one that came last: if both are on trial, nobody can say which of the two is wrong."""
        order = list(self._fleet)
        newcomer = max(trial.on_trial, key=order.index)
        newcomer.is_refused = True
        error = RegistrationRefused(
            f"worker {newcomer.worker_id} cannot join: a prompt computed by {trial.prefill.worker_id} and "
            f"continued by {trial.decode.worker_id} is not answered as {trial.decode.worker_id} answers it "
            f"alone: {found}; compare weights and settings of the two"
        )
        event(logger, "join test failed", level=logging.ERROR, worker_id=newcomer.worker_id,
              reason=error.message)  # fmt: skip
        self._fleet.refused(newcomer.registration, error.message)
        return [Send(newcomer.worker_id, WorkerRefused(error=error.report()))]


def _complement(one: Worker, other: Worker) -> bool:
    """KV may be handed from one of the two to the other."""
    return one.role is not other.role and {*one.role.phases, *other.role.phases} == set(PHASES)
