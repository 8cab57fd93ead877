"""A prefill and a decode worker with real block pools, on a network that does what the test says.
Imported, not collected. Every write carries what it should carry, and every landing is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton.handoff.credits import CreditLine
from baton.handoff.destination import (
    Activate,
    Cancel,
    CancelAcknowledged,
    DestinationTable,
    FirstTokenArrived,
    Free,
    GiveUp,
    OwnerAborted,
    Probe,
    Register,
    Reserve,
    SourceFailed,
    SourceLost,
    SourceReassured,
    WriteArrived,
)
from baton.handoff.source import (
    AcknowledgeCancel,
    BlocksComputed,
    CancelReceived,
    DestinationRegistered,
    Fail,
    GiveFirstToken,
    PrefillEnded,
    PrefillPreempted,
    Reassure,
    Release,
    SourceTable,
    StreamKey,
    Write,
    WriteEnded,
)
from baton.handoff.timing import RESEND_S, SILENCE_S

LEASE_S = 30.0
NUM_LAYERS = 2


@dataclass
class Job:
    handoff_id: str
    num_blocks: int
    num_skipped: int
    first_token: int | None = None
    """Wanted along with the KV."""
    source_blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_prefill_over: bool = False
    is_source_released: bool = False
    destination_blocks: list[int] = field(default_factory=list)
    epoch: int = 0
    is_decode_over: bool = False
    was_given_up: bool = False


class World:
    def __init__(self, *, source_pool: int, destination_pool: int, max_outstanding_blocks: int = 4) -> None:
        self.now_s = 0.0
        self.source = SourceTable(
            num_layers=NUM_LAYERS,
            bytes_per_block_layer=1,
            max_outstanding_bytes=max_outstanding_blocks * NUM_LAYERS,
            reassure_every_s=LEASE_S / 6,
        )
        self.destination = DestinationTable(silence_s=SILENCE_S, resend_s=RESEND_S)
        self.credits = CreditLine(max_reserved_blocks=max(1, destination_pool // 2))
        self.source_free = list(range(source_pool))
        self.destination_free = list(range(100, 100 + destination_pool))
        self.source_memory: dict[int, tuple[str, int] | None] = {}
        """block → (hand-off, index in its prompt)."""
        self.destination_memory: dict[tuple[int, int], tuple[str, int]] = {}
        """(block, layer) → what was written."""
        self.writable: dict[int, tuple[str, int]] = {}
        """Destination block → (hand-off, epoch) that may write to it."""
        self.jobs: dict[str, Job] = {}
        self.messages: list[Callable[[], None]] = []
        self.in_flight: list[tuple[Write, list[tuple[str, int] | None]]] = []
        self.is_source_alive = self.is_destination_alive = True
        self.num_activated = self.num_given_up = 0

    # ── engines ───────────────────────────────────────────────────────────────────────────────

    def add(
        self, handoff_id: str, num_blocks: int, num_skipped: int = 0, first_token: int | None = None
    ) -> Job:
        job = Job(handoff_id, num_blocks, min(num_skipped, num_blocks - 1), first_token)
        self.jobs[handoff_id] = job
        return job

    def step_prefill(self, job: Job) -> None:
        """One chunk of one block, if there is room."""
        if not self.is_source_alive or job.is_prefill_over:
            return
        if not job.source_blocks:
            if len(self.source_free) < job.num_blocks:
                return
            job.source_blocks = [self.source_free.pop(0) for _ in range(job.num_blocks)]
        self.source_memory[job.source_blocks[job.num_computed]] = (job.handoff_id, job.num_computed)
        job.num_computed += 1
        self._tell_source(
            BlocksComputed(
                handoff_id=job.handoff_id,
                block_ids=job.source_blocks,
                num_ready=job.num_computed,
                num_total=job.num_blocks,
            )
        )
        if job.num_computed == job.num_blocks:
            self.end_prefill(job, LEASE_S)

    def end_prefill(self, job: Job, lease_s: float | None) -> None:
        if not self.is_source_alive or job.is_prefill_over or job.num_computed == 0:
            return
        job.is_prefill_over = True
        self._tell_source(
            PrefillEnded(handoff_id=job.handoff_id, lease_s=lease_s, first_token=job.first_token)
        )

    def preempt(self, job: Job) -> None:
        if not self.is_source_alive or job.is_prefill_over or job.num_computed == 0:
            return
        self._tell_source(PrefillPreempted(handoff_id=job.handoff_id))
        while self.source.num_in_flight(job.handoff_id):  # the shell waits
            index = next(i for i, (w, _) in enumerate(self.in_flight) if w.key.handoff_id == job.handoff_id)
            self.land(index)
        self._reuse(job.source_blocks)
        job.source_blocks, job.num_computed = [], 0

    def step_decode(self, job: Job) -> None:
        """Reserve, if the line and the pool let it."""
        if not self.is_destination_alive or job.is_decode_over or job.destination_blocks:
            return
        if not self.credits.ask(job.handoff_id, job.num_blocks):
            return
        if len(self.destination_free) < job.num_blocks:
            self.credits.give_back(job.handoff_id)
            return
        job.epoch += 1
        job.destination_blocks = [self.destination_free.pop(0) for _ in range(job.num_blocks)]
        for index, block in enumerate(job.destination_blocks):
            self.writable[block] = (job.handoff_id, job.epoch)
            if index < job.num_skipped:  # a prefix hit
                for layer in range(NUM_LAYERS):
                    self.destination_memory[block, layer] = (job.handoff_id, index)
        self._tell_destination(
            Reserve(
                handoff_id=job.handoff_id,
                epoch=job.epoch,
                sources=("p0",),
                lease_s=4 * LEASE_S,
                wants_first_token=job.first_token is not None,
            )
        )

    def abort_decode(self, job: Job) -> None:
        if not self.is_destination_alive or job.is_decode_over:
            return
        if job.destination_blocks:
            self._tell_destination(OwnerAborted(job.handoff_id))
        else:
            self.credits.give_back(job.handoff_id)
            job.is_decode_over = True

    def kill_source(self) -> None:
        self.is_source_alive = False
        self.in_flight.clear()

    def kill_destination(self) -> None:
        self.is_destination_alive = False
        self.writable.clear()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        if self.is_source_alive:
            self._carry_out_source(self.source.on_time(self.now_s))
        if self.is_destination_alive:
            self._carry_out_destination(self.destination.on_time(self.now_s))

    # ── network ───────────────────────────────────────────────────────────────────────────────

    def land(self, index: int) -> None:
        """A write ends: its bytes are there, its notice leaves, the source learns of it."""
        write, carried = self.in_flight.pop(index)
        if not self.is_destination_alive:
            self._tell_source(WriteEnded(write.key, write.seq, False))
            return
        now = [self.source_memory.get(block) for block in write.source_blocks]
        assert now == carried, f"source blocks changed while {write} read them"
        for block, what in zip(write.destination_blocks, now, strict=True):
            owner = self.writable.get(block)
            assert owner == (write.key.handoff_id, write.key.epoch), f"{write} landed in blocks of {owner}"
            assert what is not None
            for layer in write.layers:
                self.destination_memory[block, layer] = what
        self._send_to_destination(
            WriteArrived(
                handoff_id=write.key.handoff_id,
                epoch=write.key.epoch,
                source="p0",
                seq=write.seq,
                total=write.total,
            )
        )
        self._tell_source(WriteEnded(write.key, write.seq, True))

    def deliver(self, index: int, *, is_repeated: bool = False) -> None:
        message = self.messages[index] if is_repeated else self.messages.pop(index)
        message()

    def lose(self, index: int) -> None:
        self.messages.pop(index)

    def _send_to_source(self, event: Any) -> None:
        self.messages.append(lambda: self._tell_source(event))

    def _send_to_destination(self, event: Any) -> None:
        self.messages.append(lambda: self._tell_destination(event))

    def _tell_source(self, event: Any) -> None:
        if self.is_source_alive:
            self._carry_out_source(self.source.on_event(event, self.now_s))

    def _tell_destination(self, event: Any) -> None:
        if self.is_destination_alive:
            self._carry_out_destination(self.destination.on_event(event, self.now_s))

    # ── actions ───────────────────────────────────────────────────────────────────────────────

    def _carry_out_source(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Write():
                    carried = [self.source_memory.get(block) for block in action.source_blocks]
                    assert len(carried) == len(action.destination_blocks) > 0
                    self.in_flight.append((action, carried))
                case Release(handoff_id):
                    job = self.jobs[handoff_id]
                    assert not job.is_source_released
                    job.is_source_released = True
                    self._reuse(job.source_blocks)
                case GiveFirstToken(key, token_id):
                    self._send_to_destination(
                        FirstTokenArrived(
                            handoff_id=key.handoff_id, epoch=key.epoch, source="p0", token_id=token_id
                        )
                    )
                case Fail(key, reason):
                    self._send_to_destination(
                        SourceFailed(handoff_id=key.handoff_id, epoch=key.epoch, source="p0", reason=reason)
                    )
                case AcknowledgeCancel(key):
                    self._send_to_destination(
                        CancelAcknowledged(handoff_id=key.handoff_id, epoch=key.epoch, source="p0")
                    )
                case Reassure(key):
                    self._send_to_destination(
                        SourceReassured(handoff_id=key.handoff_id, epoch=key.epoch, source="p0")
                    )

    def _carry_out_destination(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Register(handoff_id, epoch, _):
                    job = self.jobs[handoff_id]
                    self._send_to_source(
                        DestinationRegistered(
                            key=StreamKey(handoff_id, "d0", epoch),
                            num_destinations=1,
                            block_ids=job.destination_blocks[job.num_skipped :],
                            num_skipped=job.num_skipped,
                            ttl_s=LEASE_S,
                            wants_first_token=job.first_token is not None,
                        )
                    )
                case Cancel(handoff_id, epoch, _):
                    self._send_to_source(CancelReceived(StreamKey(handoff_id, "d0", epoch)))
                case Activate(handoff_id, first_token):
                    assert first_token == self.jobs[handoff_id].first_token
                    self._activate(self.jobs[handoff_id])
                case GiveUp(handoff_id, _):
                    self.num_given_up += 1
                    self.jobs[handoff_id].was_given_up = True
                case Free(handoff_id):
                    self._free(self.jobs[handoff_id])
                case Probe():
                    if not self.is_source_alive:
                        self._tell_destination(SourceLost("p0"))

    def _activate(self, job: Job) -> None:
        assert not job.is_decode_over
        for index, block in enumerate(job.destination_blocks):
            for layer in range(NUM_LAYERS):
                found = self.destination_memory.get((block, layer))
                assert found == (job.handoff_id, index), f"{job.handoff_id}: block {index} holds {found}"
        self.num_activated += 1
        self._free(job)  # decoding takes no time here

    def _free(self, job: Job) -> None:
        assert not job.is_decode_over
        job.is_decode_over = True
        self.credits.give_back(job.handoff_id)
        for block in job.destination_blocks:
            del self.writable[block]
            for layer in range(NUM_LAYERS):
                self.destination_memory.pop((block, layer), None)
        self.destination_free += job.destination_blocks

    def _reuse(self, blocks: list[int]) -> None:
        for block in blocks:
            self.source_memory[block] = None
        self.source_free += blocks
