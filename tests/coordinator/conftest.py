"""A core with a small fleet, driven by facts and a hand-held clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from baton.contract.codec import PROTOCOL_VERSION
from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    KvEvent,
    KvEvents,
    KvLayout,
    KvSource,
    LegFailed,
    Message,
    Placement,
    PrefillFinished,
    RegisterWorker,
    RequestReport,
    SequenceDelta,
    StartPrefill,
    StepOutputs,
    WorkerCapacity,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.policy import registry
from coordinator.actions import Action, Deliver, Finish, Send
from coordinator.core import Core, CoreSettings
from coordinator.intake import Submission

LAYOUT = KvLayout(
    model="demo", engine="simulated 1", transfer="none", dtype="float32",
    num_layers=2, num_kv_heads=2, head_dim=8, block_size_tokens=16,
)  # fmt: skip


def registration(worker_id: str, role: WorkerRole, **changes: Any) -> RegisterWorker:
    layout = {k: changes.pop(k) for k in list(changes) if k in KvLayout.__struct_fields__}
    capacity = {k: changes.pop(k) for k in list(changes) if k in WorkerCapacity.__struct_fields__}
    base = RegisterWorker(
        protocol_version=PROTOCOL_VERSION,
        worker_id=worker_id,
        boot_id=f"boot-{worker_id}",
        role=role,
        layout=msgspec.structs.replace(LAYOUT, **layout),
        capacity=msgspec.structs.replace(
            WorkerCapacity(num_blocks=64, max_batch_size=8, max_model_len=512, kv_bytes_per_block=1024),
            **capacity,
        ),
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        transfer_endpoint="127.0.0.1:1",
        host="127.0.0.1",
        pid=1,
    )
    return msgspec.structs.replace(base, **changes)


class RecordingSink:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.placements: list[Placement] = []
        self.reports: list[RequestReport] = []

    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None:
        assert not self.reports, "a delta after the end"
        self.token_ids += delta.token_ids
        self.placements.append(placement)

    def on_finished(self, report: RequestReport) -> None:
        self.reports.append(report)


class Bench:
    """Carries out the core's actions: messages land in `sent`, results in sinks."""

    def __init__(
        self, policies: tuple[str, str] = (registry.DEFAULT_PREFILL, registry.DEFAULT_DECODE), **settings: Any
    ) -> None:
        prefill_policy, decode_policy = map(registry.by_name, policies)
        self.core = Core(CoreSettings(**settings), prefill_policy, decode_policy, "b")
        self.now_s = 0.0
        self.sent: list[tuple[str, Message]] = []
        self.sinks: dict[str, RecordingSink] = {}
        self.prompts: dict[str, bytes] = {}

    def add(self, worker_id: str, role: WorkerRole, **changes: Any) -> None:
        message = registration(worker_id, role, **changes)
        peer = worker_id.encode()
        self.core.fleet.check(message, peer)
        self.perform(self.core.worker_registered(message, peer, self.now_s))

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self.sent.append((action.worker_id, action.message))
                case Deliver():
                    action.sink.on_delta(action.delta, action.placement)
                case Finish():
                    action.sink.on_finished(action.report)

    def submit(
        self,
        request_id: str,
        num_prompt_tokens: int = 20,
        token_ids: Sequence[int] | None = None,
        **sampling: Any,
    ) -> RecordingSink:
        sink = RecordingSink()
        submission = Submission(
            request_id=request_id,
            prompt_token_ids=pack_token_ids(range(num_prompt_tokens) if token_ids is None else token_ids),
            sampling=SamplingSpec(**({"max_tokens": 8} | sampling)),
        )
        self.perform(self.core.submit(submission, sink, self.now_s))
        self.sinks[request_id] = sink
        self.prompts[request_id] = submission.prompt_token_ids
        return sink

    def take(self, kind: type[Message]) -> list[tuple[str, Any]]:
        """Messages of one kind sent since the last take."""
        taken = [(w, m) for w, m in self.sent if isinstance(m, kind)]
        self.sent = [(w, m) for w, m in self.sent if not isinstance(m, kind)]
        return taken

    def worker(self, worker_id: str) -> Any:
        return self.core.fleet.get(worker_id)

    def kv_events(
        self,
        worker_id: str,
        sequence: int,
        *events: KvEvent,
        is_fresh_start: bool = False,
        num_prefill_tokens_done: int = 0,
    ) -> None:
        message = KvEvents(
            sequence=sequence,
            events=list(events),
            load=WorkerLoad(num_prefill_tokens_done=num_prefill_tokens_done),
            is_fresh_start=is_fresh_start,
        )
        self.perform(self.core.kv_events(self.worker(worker_id), message, self.now_s))

    def finish_prefill(
        self,
        worker_id: str,
        handoff_id: str,
        token_id: int = 100,
        text: str = "x",
        finish: str | None = None,
        num_cached_tokens: int | None = 4,
    ) -> None:
        source = KvSource(lease_s=30.0, num_tokens=20, num_bytes=2048, transfer_params={})
        message = PrefillFinished(
            delta=SequenceDelta(handoff_id, [token_id], text, finish, num_cached_tokens=num_cached_tokens),
            kv_source=None if finish else source,
            queue_s=0.0,
            prefill_s=0.01,
            load=WorkerLoad(),
        )
        self.perform(self.core.prefill_finished(self.worker(worker_id), message, self.now_s))

    def step(
        self,
        worker_id: str,
        handoff_id: str,
        *token_ids: int,
        finish: str | None = None,
        text: str | None = None,
    ) -> None:
        text = "y" * len(token_ids) if text is None else text
        message = StepOutputs(
            deltas=[SequenceDelta(handoff_id, list(token_ids), text, finish)],
            load=WorkerLoad(),
        )
        self.perform(self.core.step(self.worker(worker_id), message, self.now_s))

    def answer_one(self, dice: random.Random, live: list[tuple[str, Any]]) -> None:
        """One of these legs whose worker is still here: its prompt is done, or it gets a token."""
        worker, message = dice.choice(live)
        if self.worker(worker) is None:
            return
        if isinstance(message, StartPrefill):
            self.finish_prefill(worker, message.handoff_id, finish=dice.choice([None, None, "stop"]))
        else:
            self.step(worker, message.handoff_id, 5, finish=dice.choice([None, "length"]))

    def fail(self, worker_id: str, handoff_id: str, code: str = "kv_transfer_failed") -> None:
        message = LegFailed(handoff_id=handoff_id, error=ErrorReport(code=code, message="it broke"))
        self.perform(self.core.leg_failed(self.worker(worker_id), message, self.now_s))

    def prefilled(self, request_id: str, **sampling: Any) -> tuple[RecordingSink, str]:
        """A request whose prefill has ended: (sink, handoff id)."""
        sink = self.submit(request_id, **sampling)
        ((worker_id, start),) = self.take(StartPrefill)
        self.finish_prefill(worker_id, start.handoff_id)
        return sink, start.handoff_id

    def assert_nothing_is_held(self) -> None:
        for worker in self.core.fleet:
            account = worker.account
            assert (account.num_legs, account.num_queued_tokens, account.num_reserved_blocks) == (0, 0, 0)
            assert account.num_kv_tokens == 0
        assert self.core.num_requests == 0
        assert not self.core._attempts.legs


@pytest.fixture
def bench() -> Bench:
    """1P1D."""
    bench = Bench()
    bench.add("p0", WorkerRole.PREFILL)
    bench.add("d0", WorkerRole.DECODE)
    return bench


@pytest.fixture
def make_bench() -> type[Bench]:
    return Bench


@pytest.fixture
def make_registration() -> Any:
    return registration
