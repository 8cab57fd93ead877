"""vLLM's KV events as the contract has them: what its scheduler process publishes, in order.

vLLM numbers its batches, one per step that changed the prefix cache, and publishes them over ZeroMQ
from the process of its engine core; here they come over a local socket that only this user can open.
A publisher drops what a subscriber does not take, so a jump in the numbers is possible: the missing
ones are then asked for over vLLM's replay socket (it keeps 10,000), and what came meanwhile waits. If vLLM
has them no more, what we know is worth nothing: the listener hears AllBlocksCleared and then what
there is.

Only the first KV cache group counts: models with several (sliding windows, say) need a hit in all,
so theirs are predictions at best. Blocks of adapters or salts carry them as their namespace.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from baton.contract.errors import EngineFailed
from baton.contract.messages import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from baton.contract.tokens import pack_token_ids
from baton.wire.channels import DealerChannel, SubscriberChannel

logger = logging.getLogger("baton.engine")

REPLAY_TIMEOUT_S = 30.0
"""vLLM looks for questions ten times a second."""
MAX_WAITING = 10_000
"""Batches from behind a gap, as many as vLLM itself keeps."""


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: list[int]
    token_ids: list[int]
    block_size: int
    parent_block_hash: int | None = None
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[int]
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[_Stored | _Removed | _Cleared]


_decoder = msgspec.msgpack.Decoder(_Batch)


def events_of(payload: bytes) -> list[KvEvent]:
    """One of vLLM's batches. Raises msgspec.DecodeError."""
    events: list[KvEvent] = []
    for event in _decoder.decode(payload).events:
        if isinstance(event, _Cleared):
            events.append(AllBlocksCleared())
        elif event.group_idx or not event.block_hashes:
            continue
        elif isinstance(event, _Removed):
            events.append(BlocksRemoved(block_hashes=event.block_hashes))
        elif len(event.token_ids) == event.block_size * len(event.block_hashes):
            events.append(
                BlocksStored(
                    block_hashes=event.block_hashes,
                    parent_hash=event.parent_block_hash,
                    token_ids=pack_token_ids(event.token_ids),
                    namespace="" if event.parent_block_hash is not None else _namespace(event),
                )
            )
    return events


def _namespace(event: _Stored) -> str:
    keys = (event.extra_keys or [None])[0]
    return "" if keys is None and event.lora_name is None else repr((event.lora_name, keys))


class EventOrder:
    """Batches in any order in, in their order out. No I/O."""

    def __init__(self, on_events: Callable[[list[KvEvent]], None], ask: Callable[[int], None]) -> None:
        """`ask`: for all batches from this number on; answered by `replayed` and `replay_ended`."""
        self.next = 0
        self.num_lost = 0
        self._on_events = on_events
        self._ask_for = ask
        self._waiting: dict[int, list[KvEvent]] = {}
        self.is_asking = False

    def ask(self) -> None:
        if not self.is_asking:
            self.is_asking = True
            self._ask_for(self.next)

    def received(self, number: int, events: list[KvEvent]) -> None:
        if number < self.next:
            return
        if number > self.next:
            if len(self._waiting) < MAX_WAITING:
                self._waiting[number] = events
            self.ask()
            return
        self._take(events)

    def replayed(self, number: int, events: list[KvEvent]) -> None:
        """In ascending order and without gaps, as vLLM keeps them."""
        if number > self.next:  # it begins here: what was before is kept no more
            self._lose(number)
        self.received(number, events)

    def replay_ended(self) -> None:
        self.is_asking = False
        if self._waiting:  # lost between the answer and now
            self.ask()

    def _lose(self, number: int) -> None:
        self.num_lost += number - self.next
        self.next = number
        self._waiting = {n: events for n, events in self._waiting.items() if n > number}
        self._on_events([AllBlocksCleared()])

    def _take(self, events: list[KvEvent]) -> None:
        following: list[KvEvent] | None = events
        while following is not None:
            self.next += 1
            if following:
                self._on_events(following)
            following = self._waiting.pop(self.next, None)


class VllmKvEvents:
    """The sockets between vLLM's publisher and the engine."""

    def __init__(self, on_events: Callable[[list[KvEvent]], None]) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._on_events = on_events
        self._is_ready = False
        self._in_step = asyncio.Event()
        self._order = EventOrder(self._tell, self._ask)
        self._live: SubscriberChannel | None = None
        self._replay: DealerChannel | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of vLLM's KVEventsConfig. Makes the folder of the two sockets."""
        self._folder = tempfile.TemporaryDirectory(prefix="baton-kv-")
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self._endpoint("events"),
            "replay_endpoint": self._endpoint("replay"),
        }

    def _endpoint(self, name: str) -> str:
        assert self._folder is not None
        return f"ipc://{Path(self._folder.name) / name}"

    def connect(self) -> None:
        """On the event loop, once vLLM is up."""
        self._live = SubscriberChannel(self._on_live)
        self._replay = DealerChannel(self._on_replay)
        for channel, name in ((self._live, "events"), (self._replay, "replay")):
            channel.connect(self._endpoint(name))
            channel.start()

    async def forget_what_was(self) -> None:
        """After the warm-up, with the cache empty again: its batches are read and not told. Raises
        EngineFailed if vLLM does not answer."""
        self._in_step.clear()
        self._order.ask()
        try:
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                await self._in_step.wait()
        except TimeoutError as error:
            raise EngineFailed(f"vLLM told no KV events within {REPLAY_TIMEOUT_S:.0f} s") from error
        self._is_ready = True

    def close(self) -> None:
        for channel in (self._live, self._replay):
            if channel is not None:
                channel.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _ask(self, first: int) -> None:
        assert self._replay is not None
        if self._is_ready:
            logger.warning("kv events missing first=%d, asking for them", first)
        self._replay.send(b"", first.to_bytes(8, "big"))

    def _tell(self, events: list[KvEvent]) -> None:
        if self._is_ready:
            self._on_events(events)

    def _on_live(self, frames: list[bytes]) -> None:
        _, number, payload = frames
        self._order.received(int.from_bytes(number, "big"), events_of(payload))

    def _on_replay(self, frames: list[bytes]) -> None:
        _, _, number, payload = frames
        if not payload:  # the end of an answer
            self._order.replay_ended()
            if not self._order.is_asking:
                self._in_step.set()
        else:
            self._order.replayed(int.from_bytes(number, "big"), events_of(payload))
