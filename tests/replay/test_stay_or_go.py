"""Stay or go in virtual time: the coordinator's own core, told the same facts, decides the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from baton.contract.codec import PROTOCOL_VERSION
from baton.contract.lifecycle import Way, WorkerRole
from baton.contract.messages import (
    KvEvents,
    KvLayout,
    KvSource,
    Placement,
    PrefillFinished,
    RegisterWorker,
    RequestReport,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
)
from baton.contract.sampling import SamplingSpec
from baton.policy.registry import by_name
from baton.policy.stay_or_go import Pace
from baton.replay import ReplaySettings, parse_fleet, replay
from baton.replay.fleet import BOOT_ID, Member
from baton.replay.listening import Listener
from baton.replay.requests import Request
from baton.replay.simulation import _Replay
from baton.simulation import FinishedLeg, PlannedStep, SimulatedWorkerSettings, StepResult
from baton.step_time import KvLink, LinearStepTime
from baton.workload import SessionWorkload, Trace, TraceRequest, parse_lengths
from baton.workload.trace import trace_of
from coordinator.actions import Action, Finish, Send
from coordinator.core import Core, CoreSettings
from coordinator.intake import Submission

BLOCK = 32
PREFILL = LinearStepTime(base_s=0.01, per_prefill_token_s=2e-4)
DECODE = LinearStepTime(base_s=0.01, per_prefill_token_s=2e-4, per_decode_s=2e-4, per_context_token_s=1e-7)
LINK = KvLink(bytes_per_s=1e6, latency_s=0.02)
LINK_PACE = Pace(prefill=PREFILL, decode=DECODE, handoff_s=0.03, handoff_per_byte_s=1e-6)


def settings(fleet: str, **more: Any) -> ReplaySettings:
    worker = SimulatedWorkerSettings(num_blocks=4000, block_size_tokens=BLOCK, max_num_batched_tokens=2048)
    base: dict[str, Any] = {"link": LINK, "kv_bytes_per_token": 1, "expected_output_tokens": 1}
    return ReplaySettings(
        fleet=parse_fleet(fleet), worker=worker, prefill_time=PREFILL, decode_time=DECODE, **(base | more)
    )


def conversations(rate_per_s: float, seed: int = 1) -> Trace:
    return SessionWorkload(
        num_sessions=60,
        session_rate_per_s=rate_per_s,
        num_apps=6,
        mean_think_s=2.0,
        answer=parse_lengths("uniform:10,120"),
        max_model_len=8192,
        block_size_tokens=BLOCK,
    ).generate(seed=seed)


def turn(arrival_s: float, num_prompt: int, num_output: int, hashes: Iterable[int]) -> TraceRequest:
    return TraceRequest(0, arrival_s, num_prompt, num_output, np.array(list(hashes), np.int64), -1, 0, 0.0)


class _Client:
    placement = Placement()

    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None:
        return

    def on_finished(self, report: RequestReport) -> None:
        self.placement = report.placement


class _ToldSteps(Listener):
    """Tells the core of each single step of a row, at the moment at which the replay counts it."""

    told: _BesideCore

    def _hear(
        self,
        member: Member,
        plan: PlannedStep,
        num_ended: int,
        leg_ids: Sequence[str],
        first_tokens: Iterable[str],
    ) -> None:
        for number in range(member.num_heard + 1, num_ended + 1):
            self.told.step(member, leg_ids, plan.step_end_s(number), is_latest=number == num_ended)
        super()._hear(member, plan, num_ended, leg_ids, first_tokens)


class _BesideCore(_Replay):
    """A replay that tells a coordinator's core all that its own side hears, and asks it the same."""

    def __init__(self, trace: Trace, config: ReplaySettings) -> None:
        super().__init__(trace, config, None)
        assert self._fleet.pace is not None
        listener = _ToldSteps(self._fleet, self._fleet.pace, self._requests, is_late=False)
        listener.told = self
        self._listener = listener
        self.core = Core(
            CoreSettings(pace=config.pace, expected_output_tokens=config.expected_output_tokens),
            by_name("lmetric"),
            by_name("smallest-batch"),
            "b",
        )
        self.clients = [_Client() for _ in self._requests]
        self.handoff_ids: dict[str, str] = {}
        self.num_tokens: Counter[str] = Counter()
        for member in self._fleet.members:
            self.core.worker_registered(_registration(member), member.account.worker_id.encode(), 0.0)

    def _worker(self, member: Member) -> Any:
        return self.core.fleet.get(member.account.worker_id)

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Finish):
                action.sink.on_finished(action.report)
            if isinstance(action, Send) and isinstance(action.message, StartPrefill | StartDecode):
                self.handoff_ids[action.message.request_id] = action.message.handoff_id

    def _arrived(self, request: Request) -> None:
        self._prompts.fill(request)
        packed = request.packed
        super()._arrived(request)
        assert not self._queue, "two queues would have to be compared as well"
        submission = Submission(
            request_id=request.leg_id,
            prompt_token_ids=packed,
            sampling=SamplingSpec(max_tokens=request.num_output_tokens, ignore_eos=True),
        )
        self.perform(self.core.submit(submission, self.clients[request.index], self._now_s))

    def _report(self, member: Member, result: StepResult) -> None:
        sequence = member.num_batches
        super()._report(member, result)
        worker, load = self._worker(member), member.worker.load()
        if result.events:
            message = KvEvents(sequence=sequence, events=list(result.events), load=load)
            self.perform(self.core.kv_events(worker, message, self._now_s))
        elif result.num_prefill_tokens and not result.tokens:
            self.perform(self.core.step(worker, StepOutputs(deltas=[], load=load), self._now_s))

    def _prefill_finished(self, member: Member, request: Request, finished: FinishedLeg) -> None:
        super()._prefill_finished(member, request, finished)
        self.num_tokens[request.leg_id] += 1
        message = PrefillFinished(
            delta=SequenceDelta(
                self.handoff_ids[request.leg_id], [7], "x", num_cached_tokens=finished.num_cached_tokens
            ),
            kv_source=KvSource(
                lease_s=1e9, num_tokens=request.num_prompt_tokens, num_bytes=1, transfer_params={}
            ),
            queue_s=0.0,
            prefill_s=self._now_s - finished.first_step_s,
            load=member.worker.load(),
        )
        self.perform(self.core.prefill_finished(self._worker(member), message, self._now_s))

    def step(self, member: Member, leg_ids: Sequence[str], end_s: float, *, is_latest: bool) -> None:
        deltas = []
        for leg_id in leg_ids:
            self.num_tokens[leg_id] += 1
            is_last = self.num_tokens[leg_id] == self._requests[int(leg_id)].num_output_tokens
            deltas.append(SequenceDelta(self.handoff_ids[leg_id], [7], "x", "length" if is_last else None))
        load = member.worker.load()
        if not is_latest:  # those of the row were running then, whoever is now
            load = msgspec.structs.replace(load, num_running=len(leg_ids))
        message = StepOutputs(deltas=deltas, load=load)
        self.perform(self.core.step(self._worker(member), message, end_s))


def _registration(member: Member) -> RegisterWorker:
    account = member.account
    return RegisterWorker(
        protocol_version=PROTOCOL_VERSION,
        worker_id=account.worker_id,
        boot_id=BOOT_ID,
        role=WorkerRole(account.worker_id.partition("-")[0]),
        layout=KvLayout(
            model="demo", engine="simulated 1", transfer="none", dtype="float32",
            num_layers=2, num_kv_heads=2, head_dim=8, block_size_tokens=BLOCK,
        ),
        capacity=account.capacity,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        transfer_endpoint="127.0.0.1:1",
        host="127.0.0.1",
        pid=1,
        has_kv_events=True,
    )  # fmt: skip


@pytest.mark.parametrize("pace", [None, LINK_PACE], ids=["learnt", "given"])
@pytest.mark.parametrize("fleet", ["3P2D", "4P4D", "2P1D1both"])
def test_every_choice_is_the_one_the_coordinator_makes(fleet: str, pace: Pace | None):
    """
    1. a replay of conversations tells a core each event, step by step, as its workers would
    2. the core chooses the same workers for every request, and the same prompts stay
    3. what it learnt of the fleet's pace is the same to the last bit
    """
    run = _BesideCore(conversations(6.0), settings(fleet, pace=pace))
    result = run.run()
    ids = [member.account.worker_id for member in run._fleet.members]
    placements = [client.placement for client in run.clients]
    assert [p.prefill_worker for p in placements] == [ids[n] for n in result.prefill_worker]
    assert [p.decode_worker for p in placements] == [ids[n] for n in result.decode_worker]
    assert [p.way is Way.STAYED for p in placements] == result.is_stay.tolist()
    assert [p.predicted_hit_tokens for p in placements] == result.num_predicted_tokens.tolist()
    assert 4 <= result.num_stayed < len(placements) / 2
    assert run._fleet.pace is not None and run.core.pace.pace() == run._fleet.pace.pace()
    assert run.core.pace.num_measured == run._fleet.pace.num_measured or pace is not None
    assert not list(run.core.check_idle())


def test_a_prompt_that_stays_harms_who_decodes_there_and_nobody_else():
    """
    1. a turn of 320 tokens is prefilled by one of two workers and decoded: both hold it
    2. one long answer decodes on the only decode worker; whoever prefilled the first turn is kept busy
    3. the next turn has 20 tokens more: with the decode worker, in one step; that step is 4 ms longer
    4. without stay or go it is the other prefill worker that computes all of it, and no step is longer
    """
    beginning = range(1, 11)
    trace = trace_of(
        [
            turn(0.0, 320, 5, beginning),
            turn(5.0, 2000, 400, []),
            turn(6.0, 8000, 2, []),
            turn(6.5, 340, 1, beginning),
        ],
        name="stays",
        block_size_tokens=BLOCK,
    )
    stayed = replay(trace, settings("2P1D", pace=LINK_PACE))
    went = replay(trace, settings("2P1D", pace=LINK_PACE, has_stay_or_go=False))
    assert (stayed.is_stay.tolist(), stayed.num_stayed) == ([False, False, False, True], 1)
    assert stayed.prefill_worker[3] == stayed.decode_worker[3] == 2
    first, _, busy, other = went.prefill_worker.tolist()
    assert (went.num_stayed, busy, other) == (0, first, 1 - first)
    assert (stayed.num_cached_tokens[3], went.num_cached_tokens[3]) == (320, 0)
    assert went.ttft_s[3] == pytest.approx(0.01 + 340 * 2e-4)
    # The step in progress ends, then the one with the 20 tokens.
    assert 0.014 < stayed.ttft_s[3] < 2 * 0.011 + 20 * 2e-4
    assert stayed.finished_s[1] - went.finished_s[1] == pytest.approx(20 * 2e-4, abs=1e-9)
    assert (stayed.finished_s[0], stayed.first_token_s[2]) == (went.finished_s[0], went.first_token_s[2])


def test_nobody_follows_decode_steps_where_nothing_can_stay():
    for fleet, trace, more in [
        ("2P2D", conversations(6.0), {"has_stay_or_go": False}),
        ("2both", conversations(6.0), {}),
        ("2P2D", trace_of([turn(0.0, 100, 5, [])], name="no hashes"), {}),
    ]:
        run = _Replay(trace, settings(fleet, **more), None)
        assert run._listener is None and run._fleet.followed == []


@pytest.mark.parametrize("num_prompt", [5 * BLOCK - 2, 5 * BLOCK - 1, 5 * BLOCK], ids=["two", "one", "none"])
def test_a_first_token_may_fill_the_last_block(num_prompt: int):
    """Its hash then stands for all of it: what the decode worker tells is what the next turn asks for."""
    first = turn(0.0, num_prompt, 5, range(1, 6))
    run = _Replay(
        trace_of([first, turn(9.0, 7 * BLOCK, 5, range(1, 8))], name="two", block_size_tokens=BLOCK),
        settings("1P1D"),
        None,
    )
    run.run()
    assert run._fleet.feeds.counters.num_malformed == 0
    index = run._fleet.index
    assert index is not None
    assert (index.counters.num_unknown_parents, index.num_blocks) == (0, 7)
