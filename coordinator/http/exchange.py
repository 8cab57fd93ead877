"""One HTTP request and the answer to it.

A handler answers once: `respond` or `fail` at once, or `begin_stream`, any number of `send`, and
`end_stream`. The head of a stream is kept back until its first bytes are known, so that headers and
first token leave in one write. After the client has gone all of these do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

from baton.contract.errors import ServingError
from coordinator.http.errors import error_body, error_headers

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

_STATUS_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}
_CHUNK_SIZES = [b"%x\r\n" % size for size in range(4096)]


class HttpRequest:
    """A complete request; header names are lower-case bytes."""

    __slots__ = ("body", "headers", "is_keep_alive", "is_old", "method", "path")

    def __init__(
        self, method: bytes, path: str, headers: dict[bytes, bytes], body: bytes,
        is_keep_alive: bool, is_old: bool,
    ) -> None:  # fmt: skip
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.is_keep_alive = is_keep_alive
        self.is_old = is_old
        """HTTP/1.0: no chunked answers."""


class ExchangeOwner(Protocol):
    """The connection, as an exchange sees it."""

    def write(self, data: bytes) -> None: ...
    def write_bounded(self, data: bytes) -> None:
        """Like write; a client that leaves too much unread is dropped."""

    def exchange_done(self, exchange: Exchange, must_close: bool) -> None: ...
    def date(self) -> bytes: ...


class Exchange:
    __slots__ = ("_head", "_is_chunked", "_owner", "_state", "on_client_gone", "request", "request_id")

    _OPEN, _STREAMING, _DONE = range(3)

    def __init__(self, owner: ExchangeOwner, request: HttpRequest, request_id: str) -> None:
        self.request = request
        self.request_id = request_id
        """ASCII without control characters: it is written into headers."""
        self.on_client_gone: Callable[[], None] | None = None
        """Called once if the client leaves before the answer is complete."""
        self._owner = owner
        self._state = self._OPEN
        self._head = b""
        self._is_chunked = not request.is_old

    @property
    def reads_trailers(self) -> bool:
        """The client said so, and its stream has a place for them."""
        te = self.request.headers.get(b"te")
        return te is not None and self._is_chunked and b"trailers" in te.lower()

    @property
    def is_done(self) -> bool:
        """Answered, or nobody left to answer."""
        return self._state == self._DONE

    def respond(self, status: int, body: bytes, content_type: bytes = JSON, headers: bytes = b"") -> None:
        if self._state != self._OPEN:
            return
        self._end()
        head = b"%bcontent-type: %b\r\ncontent-length: %d\r\n%b\r\n" % (
            self._head_lines(status), content_type, len(body), headers,
        )  # fmt: skip
        self._owner.write(head if self.request.method == b"HEAD" else head + body)
        self._owner.exchange_done(self, must_close=False)

    def fail(self, error: ServingError, headers: bytes = b"", *, must_close: bool = False) -> None:
        """The error's own status and an OpenAI-shaped body."""
        if self._state != self._OPEN:
            return
        self._end()
        body = error_body(error)
        head = b"%bcontent-type: %b\r\ncontent-length: %d\r\n%b%b%b\r\n" % (
            self._head_lines(error.http_status), JSON, len(body), error_headers(error), headers,
            b"connection: close\r\n" if must_close and self.request.is_keep_alive else b"",
        )  # fmt: skip
        self._owner.write(head if self.request.method == b"HEAD" else head + body)
        self._owner.exchange_done(self, must_close)

    def begin_stream(self, headers: bytes) -> None:
        if self._state != self._OPEN:
            return
        self._state = self._STREAMING
        framing = b"transfer-encoding: chunked\r\n" if self._is_chunked else b""
        self._head = b"%bcontent-type: %b\r\ncache-control: no-cache\r\n%b%b\r\n" % (
            self._head_lines(200), EVENT_STREAM, framing, headers,
        )  # fmt: skip

    def send(self, before: bytes, text: bytes, after: bytes) -> None:
        """One event, given in three parts because only the middle one differs from token to token."""
        if self._state != self._STREAMING:
            return
        if self._is_chunked:
            size = len(before) + len(text) + len(after)
            line = _CHUNK_SIZES[size] if size < 4096 else b"%x\r\n" % size
            data = b"".join((line, before, text, after, b"\r\n"))
        else:
            data = before + text + after
        if self._head:
            data = self._head + data
            self._head = b""
        self._owner.write_bounded(data)

    def end_stream(self, last: bytes, trailers: bytes = b"") -> None:
        """`last` holds the final events, `trailers` complete header lines for a client that reads them."""
        if self._state != self._STREAMING:
            return
        self._end()
        if self._is_chunked:
            last = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(last), last, trailers)
        self._owner.write_bounded(self._head + last)
        self._owner.exchange_done(self, must_close=not self._is_chunked)

    def client_gone(self) -> None:
        """From the connection: whatever is still to come has no reader."""
        if self._state == self._DONE:
            return
        on_client_gone = self.on_client_gone
        self._end()
        if on_client_gone is not None:
            on_client_gone()

    def _end(self) -> None:
        self._state = self._DONE
        # It refers to the answer, which refers to this.
        self.on_client_gone = None

    def _head_lines(self, status: int) -> bytes:
        request = self.request
        close = b"" if request.is_keep_alive else b"connection: close\r\n"
        return b"%b%b%bx-request-id: %b\r\n" % (
            _STATUS_LINES[status], self._owner.date(), close, self.request_id.encode("ascii"),
        )  # fmt: skip
