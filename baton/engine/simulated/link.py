"""What carries simulated KV and the notices about it between two engines: TCP, one connection per pair.

The destination connects to the source's endpoint; both say who they are, and in which boot, before
anything else. A connection that breaks proves nothing about the peer: the destination connects again for
as long as it has a hand-off with that source. What does prove that the process is gone: nobody listens on
its port any more, or somebody else does. Messages that meet no connection are dropped; both halves of the
hand-off can say everything again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import msgspec

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

FRAME_LIMIT_BYTES = 1 << 20
"""Whoever sends more is not one of ours and is hung up on."""
RECONNECT_S = 0.2
PROBE_TIMEOUT_S = 1.0
_LENGTH_BYTES = 4


class Greeting(msgspec.Struct, frozen=True, array_like=True, tag=True):
    name: str
    """Of the worker."""
    boot_id: str


class KvWritten(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The bytes of one write, and the notice that rides on it."""

    notice: BlocksWritten
    start: int
    """In blocks of the prompt."""
    end: int
    from_kv: int
    """The KV that these blocks go on from."""
    kv: int


class KvLanded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A write is over only when its bytes are there."""

    handoff_id: str
    epoch: int
    seq: int


LinkMessage = (
    Greeting
    | KvWritten
    | KvLanded
    | FirstToken
    | RegisterStream
    | CancelStream
    | StreamKnown
    | StreamFailed
    | CancelDone
)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[LinkMessage] = msgspec.msgpack.Decoder(LinkMessage)


class LinkServer:
    """The source's end. Destinations are known by `Greeting.boot_id`, which a restarted worker never has."""

    def __init__(
        self,
        greeting: Greeting,
        on_message: Callable[[Greeting, LinkMessage], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._greeting = greeting
        self._on_message = on_message
        self._on_lost = on_lost
        self._server: asyncio.Server | None = None
        self._connections: set[_Frames] = set()
        self._greeted: dict[_Frames, Greeting] = {}
        self._by_boot: dict[str, _Frames] = {}

    async def start(self, host: str, port: int) -> int:
        """Returns the port; raises OSError if it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    def _accept(self) -> _Frames:
        return _Frames(self._on_open, self._on_frame, self._on_closed)

    def _on_open(self, frames: _Frames) -> None:
        self._connections.add(frames)
        frames.send(self._greeting)

    def _on_frame(self, frames: _Frames, message: LinkMessage) -> None:
        if isinstance(message, Greeting):
            self._greeted[frames] = message
            self._by_boot[message.boot_id] = frames
        elif frames in self._greeted:
            self._on_message(self._greeted[frames], message)
        else:
            frames.abort()

    def _on_closed(self, frames: _Frames) -> None:
        self._connections.discard(frames)
        greeting = self._greeted.pop(frames, None)
        if greeting is not None and self._by_boot.get(greeting.boot_id) is frames:
            del self._by_boot[greeting.boot_id]
            self._on_lost(greeting.boot_id)

    def send(self, boot_id: str, message: LinkMessage) -> bool:
        """False: that destination is not connected."""
        frames = self._by_boot.get(boot_id)
        if frames is None:
            return False
        frames.send(message)
        return True

    def reset(self, boot_id: str) -> None:
        frames = self._by_boot.get(boot_id)
        if frames is not None:
            frames.abort()

    def close(self) -> None:
        """Nobody is listened to and nothing is sent from here on."""
        if self._server is not None:
            self._server.close()
        self._by_boot.clear()
        for frames in list(self._connections):
            frames.abort()

    async def stop(self) -> None:
        self.close()
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None


class Links:
    """The destination's end of all its connections. A source is named `host:port/boot_id`."""

    def __init__(
        self,
        greeting: Greeting,
        *,
        on_open: Callable[[str], None],
        on_message: Callable[[str, LinkMessage], None],
        on_dead: Callable[[str, str], None],
        is_wanted: Callable[[str], bool],
    ) -> None:
        """on_open(source): messages pass from now on, and none did before. on_dead(source, reason): its
        process is gone, or never heard of us. is_wanted(source): connect again if the connection breaks."""
        self._greeting = greeting
        self._on_open = on_open
        self._on_message = on_message
        self._on_dead = on_dead
        self._is_wanted = is_wanted
        self._links: dict[str, _Link] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}

    def open(self, source: str) -> bool:
        """True: it is; otherwise `on_open` or `on_dead` will say."""
        link = self._links.get(source)
        if link is None:
            link = self._links[source] = _Link(source)
            link.task = asyncio.get_running_loop().create_task(
                self._connect(link), name=f"kv link to {source}"
            )
        return link.is_open

    def send(self, source: str, message: LinkMessage) -> None:
        link = self._links.get(source)
        if link is not None and link.is_open and link.frames is not None:
            link.frames.send(message)

    def reset(self, source: str) -> None:
        link = self._links.get(source)
        if link is not None and link.frames is not None:
            link.frames.abort()

    def probe(self, source: str) -> None:
        """Find out whether the process that was `source` is gone; `on_dead` if so. Silence is no proof."""
        if source not in self._probes:
            task = asyncio.get_running_loop().create_task(self._probe(source), name=f"kv probe of {source}")
            self._probes[source] = task
            task.add_done_callback(lambda _: self._probes.pop(source, None))

    def stop(self) -> None:
        for task in list(self._probes.values()):
            task.cancel()
        for link in list(self._links.values()):
            self._drop(link)

    async def _connect(self, link: _Link) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.create_connection(lambda: self._frames(link), *_address(link.source))
            except (OSError, ValueError, OverflowError) as error:
                if isinstance(error, ConnectionRefusedError) or not link.was_open:
                    self._dead(link, f"source {link.source} cannot be reached: {error}")
                    return
                if not self._is_wanted(link.source):
                    self._drop(link)
                    return
                await asyncio.sleep(RECONNECT_S)
            else:
                return

    def _frames(self, link: _Link) -> _Frames:
        return _Frames(
            lambda frames: self._on_connected(link, frames),
            lambda frames, message: self._on_frame(link, message),
            lambda frames: self._on_closed(link),
        )

    def _on_connected(self, link: _Link, frames: _Frames) -> None:
        link.frames = frames
        frames.send(self._greeting)

    def _on_frame(self, link: _Link, message: LinkMessage) -> None:
        if self._links.get(link.source) is not link:
            return
        if not isinstance(message, Greeting):
            self._on_message(link.source, message)
        elif message.boot_id == _boot_id(link.source):
            link.is_open = link.was_open = True
            self._on_open(link.source)
        else:
            self._dead(link, f"source {link.source} is gone: its port belongs to another worker")

    def _on_closed(self, link: _Link) -> None:
        link.frames, link.is_open = None, False
        if self._links.get(link.source) is not link:
            return
        if self._is_wanted(link.source):
            link.task = asyncio.get_running_loop().create_task(self._connect(link), name="kv link again")
        else:
            del self._links[link.source]

    async def _probe(self, source: str) -> None:
        found: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_frame(frames: _Frames, message: LinkMessage) -> None:
            if isinstance(message, Greeting) and not found.done():
                found.set_result(message.boot_id)

        frames = _Frames(lambda _: None, on_frame, lambda _: None)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(lambda: frames, *_address(source))
                is_gone = await found != _boot_id(source)
        except ConnectionRefusedError:
            is_gone = True
        except (OSError, TimeoutError):
            is_gone = False
        finally:
            frames.abort()
        if is_gone and (link := self._links.get(source)) is not None:
            self._dead(link, f"source {source} is gone")

    def _dead(self, link: _Link, reason: str) -> None:
        self._drop(link)
        self._on_dead(link.source, reason)

    def _drop(self, link: _Link) -> None:
        self._links.pop(link.source, None)
        if link.task is not None and link.task is not asyncio.current_task():
            link.task.cancel()
        if link.frames is not None:
            link.frames.abort()


class _Link:
    def __init__(self, source: str) -> None:
        self.source = source
        self.task: asyncio.Task[None] | None = None
        self.frames: _Frames | None = None
        self.is_open = False
        self.was_open = False


def _address(source: str) -> tuple[str, int]:
    """Raises ValueError."""
    host, _, port = source.rpartition("/")[0].rpartition(":")
    return host.strip("[]"), int(port)


def _boot_id(source: str) -> str:
    return source.rpartition("/")[2]


class _Frames(asyncio.Protocol):
    """Messages on one connection."""

    def __init__(
        self,
        on_open: Callable[[_Frames], None],
        on_frame: Callable[[_Frames, LinkMessage], None],
        on_closed: Callable[[_Frames], None],
    ) -> None:
        self._on_open = on_open
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def send(self, message: LinkMessage) -> None:
        if self._transport is not None:
            body = _encoder.encode(message)
            self._transport.write(len(body).to_bytes(_LENGTH_BYTES, "little") + body)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, not an isinstance: uvloop's transports do not inherit asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._on_open(self)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        start = 0
        while (body := start + _LENGTH_BYTES) <= len(data):
            end = body + int.from_bytes(data[start:body], "little")
            if end - body > FRAME_LIMIT_BYTES:
                self.abort()
                return
            if end > len(data):
                break
            start = end
            try:
                message = _decoder.decode(data[body:end])
            except msgspec.MsgspecError as error:
                logger.warning("kv link hung up on: %s", error)
                self.abort()
                return
            self._on_frame(self, message)
        self._rest = data[start:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_closed(self)
