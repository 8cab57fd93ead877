"""How simulated KV gets from one worker to another: a small TCP exchange.

The source keeps each finished prompt as a hold with a lease (`simulated_holds`); a reader connects to
the source's endpoint and asks for holds by id, one per line; the source answers `<id> <kv>` and
lets go, or `<id> gone` when the lease has ended. So release needs no registry shared between
processes, a dead source is noticed at once (the connection breaks), and a late read is an answer
instead of somebody else's blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

LINE_LIMIT_BYTES = 128
"""A line is an id and a number; whoever sends more is not one of ours and is hung up on."""


class KvServer:
    """Answers readers. `read(hold_id)` gives the KV and releases the hold, or None."""

    def __init__(self, read: Callable[[str], int | None]) -> None:
        self._read = read
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Transport] = set()

    async def start(self, host: str, port: int) -> int:
        """Returns the port; raises OSError if it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Lines(self._answer, self._connections), host, port)
        return int(self._server.sockets[0].getsockname()[1])

    def _answer(self, lines: list[str], transport: asyncio.Transport) -> None:
        answers = []
        for hold_id in lines:
            kv = self._read(hold_id)
            answers.append(f"{hold_id} {'gone' if kv is None else kv}\n")
        transport.write("".join(answers).encode())

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for transport in list(self._connections):
                transport.abort()
            await self._server.wait_closed()
            self._server = None


class KvReader:
    """Asks sources for holds; one connection per source, opened when it is first needed."""

    def __init__(self, on_read: Callable[[str, int | None, str], None]) -> None:
        """on_read(hold_id, kv, reason): `kv` is None, with the reason, when nothing came."""
        self._on_read = on_read
        self._links: dict[str, _Link] = {}

    def read(self, endpoint: str, hold_id: str) -> None:
        link = self._links.get(endpoint)
        if link is None:
            link = self._links[endpoint] = _Link(endpoint, self._on_read, self._links)
        link.ask(hold_id)

    def reset(self, endpoint: str) -> None:
        link = self._links.get(endpoint)
        if link is not None:
            link.reset()

    def stop(self) -> None:
        for link in list(self._links.values()):
            link.close()


class _Link:
    """One connection to one source. Questions of one loop turn leave in one write."""

    def __init__(
        self, endpoint: str, on_read: Callable[[str, int | None, str], None], links: dict[str, _Link]
    ) -> None:
        self._endpoint = endpoint
        self._on_read = on_read
        self._links = links
        self._unsent: list[str] = []
        self._open: dict[str, None] = {}
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._connect(), name=f"kv link to {endpoint}")

    def ask(self, hold_id: str) -> None:
        self._open[hold_id] = None
        self._unsent.append(hold_id)
        if self._transport is not None and len(self._unsent) == 1:
            self._loop.call_soon(self._flush)

    async def _connect(self) -> None:
        host, _, port = self._endpoint.rpartition(":")
        try:
            transport, _ = await self._loop.create_connection(
                lambda: _Lines(self._on_lines, set(), self._on_lost), host.strip("[]"), int(port)
            )
        except (OSError, ValueError, OverflowError) as error:
            self._fail(f"source {self._endpoint} cannot be reached: {error}")
            return
        self._transport = transport
        self._flush()

    def _flush(self) -> None:
        if self._transport is not None and self._unsent:
            self._transport.write("".join(f"{hold_id}\n" for hold_id in self._unsent).encode())
            self._unsent.clear()

    def _on_lines(self, lines: list[str], transport: asyncio.Transport) -> None:
        for line in lines:
            hold_id, _, answer = line.partition(" ")
            if hold_id in self._open:
                del self._open[hold_id]
                if answer.isdigit():
                    self._on_read(hold_id, int(answer), "")
                else:
                    self._on_read(hold_id, None, f"source {self._endpoint} no longer holds the KV")

    def _on_lost(self) -> None:
        self._fail(f"source {self._endpoint} closed the connection")

    def _fail(self, reason: str) -> None:
        # The next question opens a new connection.
        if self._links.get(self._endpoint) is self:
            del self._links[self._endpoint]
        self._transport = None
        unanswered, self._open = list(self._open), {}
        for hold_id in unanswered:
            self._on_read(hold_id, None, reason)

    def reset(self) -> None:
        transport = self._transport
        self._task.cancel()
        self._fail(f"the link to source {self._endpoint} was reset")
        if transport is not None:
            transport.abort()

    def close(self) -> None:
        self._open.clear()
        self._links.pop(self._endpoint, None)
        self._task.cancel()
        if self._transport is not None:
            self._transport.abort()


class _Lines(asyncio.Protocol):
    """Splits a byte stream into lines and hands over all that arrived together."""

    def __init__(
        self,
        on_lines: Callable[[list[str], asyncio.Transport], None],
        connections: set[asyncio.Transport],
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self._on_lines = on_lines
        self._connections = connections
        self._on_lost = on_lost
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, not an isinstance: uvloop's transports do not inherit asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self._transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_LIMIT_BYTES or any(len(line) > LINE_LIMIT_BYTES for line in lines):
            self._transport.abort()
        elif lines:
            self._on_lines([line.decode("ascii", "replace") for line in lines], self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self._transport)
        if self._on_lost is not None:
            self._on_lost()
