"""The client of the ZeroMQ door for asyncio programs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from baton.client.submission import Prompt, build
from baton.contract import codec
from baton.contract.errors import (
    CoordinatorLost,
    InvalidRequest,
    PeerError,
    ProtocolMismatch,
    QueueFull,
    error_from_report,
)
from baton.contract.messages import (
    AbortRequest,
    RequestDelta,
    RequestFinished,
    RequestRefused,
    RequestReport,
)
from baton.wire.channels import DealerChannel
from baton.wire.endpoints import DEFAULT_CLIENT_ADDRESS, DEFAULT_CLIENT_PORT, parse_address, tcp


class AsyncStream:
    """Deltas of one request, in order. `report` is set once the stream has ended well or was aborted.

    Iterating raises the request's ServingError if it was refused or failed.
    """

    def __init__(self, client: AsyncBatonClient, request_id: str, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._inbox: asyncio.Queue[RequestDelta | RequestFinished | RequestRefused] = asyncio.Queue()
        self.request_id = request_id
        self.report: RequestReport | None = None

    def __aiter__(self) -> AsyncIterator[RequestDelta]:
        return self

    async def __anext__(self) -> RequestDelta:
        if self.report is not None:
            raise StopAsyncIteration
        try:
            message = await asyncio.wait_for(self._inbox.get(), self._timeout_s)
        except TimeoutError:
            self.abort()
            raise PeerError(f"nothing heard from {self._client.address} for {self._timeout_s:g} s") from None
        if isinstance(message, RequestDelta):
            return message
        if isinstance(message, RequestRefused):
            raise error_from_report(message.error)
        self.report = message.report
        if message.report.error is not None and message.report.error.code != "aborted":
            raise error_from_report(message.report.error)
        raise StopAsyncIteration

    def abort(self) -> None:
        """Stop the request on the fleet; the stream then ends."""
        self._client._abort(self.request_id)


class AsyncBatonClient:
    """One connection to a coordinator. Use as an async context manager, or call `close`."""

    def __init__(self, address: str = DEFAULT_CLIENT_ADDRESS, *, timeout_s: float = 300.0) -> None:
        """`address`: host:port of the coordinator's ZeroMQ door. `timeout_s`: longest silence of a
        stream. Connects in the background; needs a running event loop."""
        host, port = parse_address(address, DEFAULT_CLIENT_PORT)
        self.address = f"{host}:{port}"
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._streams: dict[str, AsyncStream] = {}
        self._is_lost = False
        self._channel = DealerChannel(
            self._on_frames, on_disconnected=self._on_disconnected, on_connected=self._on_connected
        )
        self._channel.connect(tcp(host, port))
        self._channel.start()

    async def __aenter__(self) -> AsyncBatonClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, prompt: Prompt, *, model: str | None = None, **options: Any) -> AsyncStream:
        """Send a request. `options` are the fields of `SamplingSpec` (max_tokens, temperature, ...).

        Raises InvalidRequest for options that cannot work and for more than fits into a message, QueueFull
        when nothing can be sent, and CoordinatorLost between the loss of a coordinator and the next one.
        (Before the first one is up, a request waits for it.)
        """
        if self._is_lost:
            raise CoordinatorLost(f"there is no coordinator at {self.address} any more")
        stream = AsyncStream(self, f"r{next(self._ids)}", self._timeout_s)
        frame = codec.encode(build(stream.request_id, prompt, model, options))
        if len(frame) > codec.MAX_MESSAGE_BYTES:  # sent, it would cost the connection and all on it
            raise InvalidRequest(
                f"the request has {len(frame)} bytes, the limit is {codec.MAX_MESSAGE_BYTES}"
            )
        if not self._channel.send(frame):
            raise QueueFull(f"the queue to {self.address} is full")
        self._streams[stream.request_id] = stream
        return stream

    def close(self) -> None:
        """Abort what still runs and disconnect."""
        for request_id in list(self._streams):
            self._abort(request_id)
        self._channel.close(linger_ms=500)

    def _abort(self, request_id: str) -> None:
        if request_id in self._streams:
            self._channel.send(codec.encode(AbortRequest(request_id=request_id)))

    def _on_connected(self) -> None:
        self._is_lost = False

    def _on_disconnected(self) -> None:
        """The requests of this connection are nobody's now; a successor has never heard of them."""
        self._is_lost = True
        error = CoordinatorLost(f"the connection to {self.address} was lost").report()
        for request_id, stream in list(self._streams.items()):
            del self._streams[request_id]
            stream._inbox.put_nowait(RequestRefused(request_id=request_id, error=error))

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            message = codec.client_replies.decode(frames[0])
        except ProtocolMismatch:
            return  # a newer coordinator's message that this client cannot use
        stream = self._streams.get(message.request_id)
        if stream is None:
            if isinstance(message, RequestRefused) and not message.request_id and len(self._streams) == 1:
                stream = next(iter(self._streams.values()))
            else:
                if isinstance(message, RequestDelta):  # sent before the loss, reached the successor
                    self._channel.send(codec.encode(AbortRequest(request_id=message.request_id)))
                return
        if not isinstance(message, RequestDelta):
            del self._streams[stream.request_id]
        stream._inbox.put_nowait(message)
