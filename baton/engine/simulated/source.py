"""The prefill half of simulated hand-offs: `baton.handoff.source`, with invented bytes on a simulated link.

A hold is opened with each prompt whose KV is to be kept, before anything of it is computed. Whoever
registers is written to: chunk by chunk while the prompt is computed, or all at once if it comes after the
prefill, which is what a pull is here: a registration that comes late. A write of a part of the prompt
takes that part of `transfer_s`, one after the other; what it carries is fixed when it begins.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable

from baton.clock import Clock
from baton.contract.tokens import TOKEN_BYTES
from baton.engine.simulated.faults import Fault, Faults
from baton.engine.simulated.link import Greeting, KvLanded, KvWritten, LinkMessage, LinkServer
from baton.engine.simulated.model import kv_of
from baton.engine.simulated.settings import SimulatedEngineSettings
from baton.engine.simulated.ticker import Ticker
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
    ReleaseWanted,
    SourceAction,
    SourceEvent,
    SourceTable,
    StreamKey,
    Write,
    WriteEnded,
)
from baton.handoff.timing import MAX_OUTSTANDING_BYTES, REASSURE_EVERY_S, TIMER_S
from baton.transfer.stream_wire import (
    BlocksWritten,
    CancelDone,
    CancelStream,
    FirstToken,
    RegisterStream,
    StreamFailed,
    StreamKnown,
)

logger = logging.getLogger(__name__)

MIN_TIMER_S = 0.02
"""It looks at every hold and stream, so not with every step."""


class _Prompt:
    """What its blocks hold: the KV at the end of each, computed where it is asked for."""

    def __init__(self, packed: bytes, block_size_tokens: int) -> None:
        self._packed = memoryview(packed)
        self._block_bytes = block_size_tokens * TOKEN_BYTES
        self._ends = [0]
        self._kvs = [0]
        self.num_blocks = -(-len(packed) // self._block_bytes)

    def kv_at(self, num_blocks: int) -> int:
        index = bisect_right(self._ends, num_blocks) - 1
        known, kv = self._ends[index], self._kvs[index]
        if known == num_blocks:
            return kv
        kv = kv_of(self._packed[known * self._block_bytes : num_blocks * self._block_bytes], kv)
        self._ends.insert(index + 1, num_blocks)
        self._kvs.insert(index + 1, kv)
        return kv


class _Writing:
    """A write in flight: first it takes its time, then it is on its way until it is said to have landed."""

    __slots__ = ("is_stuck", "message", "timer")

    def __init__(self, message: KvWritten, *, is_stuck: bool) -> None:
        self.message = message
        self.is_stuck = is_stuck
        self.timer: asyncio.TimerHandle | None = None


class SimulatedSource:
    def __init__(
        self,
        settings: SimulatedEngineSettings,
        clock: Clock,
        faults: Faults,
        greeting: Greeting,
        on_release: Callable[[str], None],
    ) -> None:
        """on_release(handoff_id): its blocks are of no use to anybody any more."""
        self._settings = settings
        self._clock = clock
        self._faults = faults
        self._on_release = on_release
        self._name = greeting.boot_id
        self._server = LinkServer(greeting, self._on_message, self._on_destination_lost)
        self._table = SourceTable(
            num_layers=1,
            bytes_per_block_layer=settings.kv_bytes_per_block,
            max_outstanding_bytes=MAX_OUTSTANDING_BYTES,
            reassure_every_s=REASSURE_EVERY_S,
        )
        self._prompts: dict[str, _Prompt] = {}
        """By hand-off, while its blocks are held."""
        self._writing: dict[tuple[StreamKey, int], _Writing] = {}
        self._busy_until_s: dict[StreamKey, float] = {}
        self._stream_faults: dict[StreamKey, Fault] = {}
        self._timed_s = 0.0
        self._ticker = Ticker(TIMER_S, self._tick)

    async def start(self) -> int:
        """Returns the port; raises OSError if it is taken."""
        return await self._server.start(self._settings.host, self._settings.transfer_port)

    def close(self) -> None:
        """Nothing is written from here on."""
        self._ticker.stop()
        self._server.close()
        for key, seq in list(self._writing):
            self._end_write(key, seq, is_good=False)

    async def stop(self) -> None:
        self.close()
        await self._server.stop()

    # ── the prompt ───────────────────────────────────────────────────────────────────────────

    def has(self, handoff_id: str) -> bool:
        """Its blocks are held: they are free only after `on_release`."""
        return handoff_id in self._prompts

    def begin(self, handoff_id: str, packed_prompt: bytes) -> None:
        self._prompts[handoff_id] = _Prompt(packed_prompt, self._settings.block_size_tokens)
        self._computed(handoff_id, 0)
        self._ticker.wake()

    def progress(self, handoff_id: str, num_tokens: int) -> None:
        """So many tokens of the prompt have KV here; the last block counts when the prompt is over."""
        self._computed(handoff_id, num_tokens // self._settings.block_size_tokens)

    def preempted(self, handoff_id: str) -> None:
        self._tell(PrefillPreempted(handoff_id=handoff_id))

    def finish(self, handoff_id: str, first_token: int, lease_s: float) -> None:
        """All is computed; it is held for so long, and longer while somebody is written to."""
        self._computed(handoff_id, self._prompts[handoff_id].num_blocks)
        self._tell(PrefillEnded(handoff_id=handoff_id, lease_s=lease_s, first_token=first_token))

    def give_up(self, handoff_id: str) -> None:
        """Nobody wants it, computed or not."""
        self._tell(ReleaseWanted(handoff_id=handoff_id))

    def _computed(self, handoff_id: str, num_ready: int) -> None:
        num_total = self._prompts[handoff_id].num_blocks
        self._tell(
            BlocksComputed(
                handoff_id=handoff_id, block_ids=range(num_total), num_ready=num_ready, num_total=num_total
            )
        )

    # ── destinations ─────────────────────────────────────────────────────────────────────────

    def _on_message(self, destination: Greeting, message: LinkMessage) -> None:
        match message:
            case RegisterStream():
                self._on_registration(destination, message)
            case KvLanded():
                key = StreamKey(message.handoff_id, destination.boot_id, message.epoch)
                if (key, message.seq) in self._writing:
                    self._end_write(key, message.seq, is_good=True)
            case CancelStream():
                key = StreamKey(message.handoff_id, message.destination, message.epoch)
                self._end_stuck(key)
                self._tell(CancelReceived(key))
            case _:
                logger.warning("kv notice dropped: %s is for destinations", type(message).__name__)

    def _on_registration(self, destination: Greeting, message: RegisterStream) -> None:
        key = StreamKey(message.handoff_id, message.destination, message.epoch)
        self.on_time()  # nobody is written to after a lease, however late the timer is
        if not self._table.knows(key):
            fault = self._faults.at("transfer", (destination.name,))
            if fault is not None and fault.action == "reset":
                self._server.reset(key.destination)
                return
            if fault is not None:
                self._stream_faults[key] = fault
        self._tell(
            DestinationRegistered(
                key=key,
                num_destinations=message.num_destinations,
                block_ids=message.block_ids,
                num_skipped=message.num_skipped,
                ttl_s=message.ttl_s,
                wants_first_token=message.wants_first_token,
            )
        )
        self._ticker.wake()

    def _on_destination_lost(self, boot_id: str) -> None:
        """What was on its way to it never lands. It may connect again: that it is dead is not known."""
        for key, seq in list(self._writing):
            if key.destination == boot_id:
                self._end_write(key, seq, is_good=False)

    def _end_stuck(self, key: StreamKey) -> None:
        """The destination has given up: writes that a fault holds up are given up as well."""
        for other, seq in list(self._writing):
            if other == key and self._writing[other, seq].is_stuck:
                self._end_write(key, seq, is_good=False)

    # ── the machine ──────────────────────────────────────────────────────────────────────────

    def on_time(self) -> None:
        """Ends what is over by now, however late the timer is. May be called often."""
        now_s = self._clock.now_s()
        if now_s - self._timed_s >= MIN_TIMER_S:
            self._timed_s = now_s
            self._carry_out(self._table.on_time(now_s))

    def _tick(self) -> bool:
        self.on_time()
        return not self._table.is_idle

    def _tell(self, event: SourceEvent) -> None:
        self._carry_out(self._table.on_event(event, self._clock.now_s()))

    def _carry_out(self, actions: list[SourceAction]) -> None:
        pending = deque(actions)
        while pending:
            match pending.popleft():
                case Write() as write:
                    pending.extendleft(reversed(self._write(write)))
                case GiveFirstToken(key, token_id):
                    self._send(
                        key,
                        FirstToken(
                            handoff_id=key.handoff_id, source=self._name, epoch=key.epoch, token_id=token_id
                        ),
                    )
                case Release(handoff_id):
                    del self._prompts[handoff_id]
                    self._on_release(handoff_id)
                case Fail(key, reason):
                    self._over(key)
                    logger.warning("kv stream ended: handoff_id=%s reason=%s", key.handoff_id, reason)
                    self._send(
                        key,
                        StreamFailed(
                            handoff_id=key.handoff_id, source=self._name, epoch=key.epoch, reason=reason
                        ),
                    )
                case AcknowledgeCancel(key):
                    self._over(key)
                    self._send(key, CancelDone(handoff_id=key.handoff_id, source=self._name, epoch=key.epoch))
                case Reassure(key):
                    self._send(
                        key, StreamKnown(handoff_id=key.handoff_id, source=self._name, epoch=key.epoch)
                    )

    def _send(self, key: StreamKey, message: LinkMessage) -> bool:
        return self._server.send(key.destination, message)

    def _over(self, key: StreamKey) -> None:
        self._busy_until_s.pop(key, None)
        self._stream_faults.pop(key, None)

    # ── writes ───────────────────────────────────────────────────────────────────────────────

    def _write(self, write: Write) -> list[SourceAction]:
        """What follows at once."""
        key, prompt = write.key, self._prompts[write.key.handoff_id]
        start, end = write.source_blocks[0], write.source_blocks[-1] + 1
        message = KvWritten(
            BlocksWritten(
                handoff_id=key.handoff_id,
                source=self._name,
                epoch=key.epoch,
                seq=write.seq,
                total=write.total,
            ),
            start,
            end,
            prompt.kv_at(start),
            prompt.kv_at(end),
        )
        fault = self._stream_faults.pop(key, None)
        took_s = self._settings.transfer_s * (end - start) / prompt.num_blocks
        if fault is not None and fault.action == "slow":
            took_s += fault.s
        if fault is not None and fault.action == "fail":
            return self._ended(key, write.seq, is_good=False)
        is_stuck = fault is not None and fault.action == "stall"
        writing = self._writing[key, write.seq] = _Writing(message, is_stuck=is_stuck)
        if is_stuck:
            return []
        if took_s <= 0 and key not in self._busy_until_s:
            if self._send(key, message):
                return []
            del self._writing[key, write.seq]
            return self._ended(key, write.seq, is_good=False)
        loop = asyncio.get_running_loop()
        end_s = max(self._busy_until_s.get(key, 0.0), loop.time()) + took_s
        self._busy_until_s[key] = end_s
        writing.timer = loop.call_at(end_s, self._leave, key, write.seq)
        return []

    def _leave(self, key: StreamKey, seq: int) -> None:
        """The link has carried it; whether it landed is the destination's word."""
        if not self._send(key, self._writing[key, seq].message):
            self._end_write(key, seq, is_good=False)

    def _end_write(self, key: StreamKey, seq: int, *, is_good: bool) -> None:
        writing = self._writing.pop((key, seq))
        if writing.timer is not None:
            writing.timer.cancel()
        self._carry_out(self._ended(key, seq, is_good=is_good))

    def _ended(self, key: StreamKey, seq: int, *, is_good: bool) -> list[SourceAction]:
        actions = self._table.on_event(WriteEnded(key, seq, is_good), self._clock.now_s())
        if not self._table.num_in_flight(key.handoff_id):
            self._busy_until_s.pop(key, None)
        return actions
