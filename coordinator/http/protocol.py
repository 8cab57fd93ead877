"""One client connection: bytes to requests, answers to bytes.

httptools parses; this class keeps the bounds it does not have (size of head and body, time for
both, requests waiting) and the order of answers under pipelining: one exchange at a time, further
complete requests wait, and reading stops when too many do.

Closing: a client that half-closes is taken as gone, as every ASGI server does, because a full close
looks the same from here and must abort its work at once. A request we refuse without having read it
all is answered, then we stop sending and read on for a moment: closing with unread bytes would
reset the connection and could destroy the answer on its way.

A client that does not read: writes go to the transport until its buffer is above the mark, then
events gather here and leave in one write when it drains; above `max_unread_bytes` the client is
dropped and its work aborted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, cast

import httptools

from baton.contract.errors import ServingError
from coordinator.http.errors import (
    BodyTooLarge,
    HeadTooLarge,
    MalformedHttp,
    TooManyConnections,
    TooSlow,
)
from coordinator.http.exchange import Exchange, HttpRequest
from coordinator.http.limits import HttpSettings

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_NO_HEADERS: dict[bytes, bytes] = {}


class ConnectionHost(Protocol):
    """What connections share: the door."""

    settings: HttpSettings
    date_line: bytes
    connections: set[HttpConnection]

    def now_s(self) -> float: ...
    def handle(self, exchange: Exchange) -> None:
        """Must not raise."""

    def new_exchange(self, owner: HttpConnection, request: HttpRequest) -> Exchange: ...
    def exchange_ended(self) -> None: ...
    def connection_ended(self, connection: HttpConnection) -> None: ...
    def refused(self, error: ServingError) -> None: ...


class HttpConnection(asyncio.Protocol):
    __slots__ = (
        "_backlog", "_backlog_bytes", "_body", "_body_bytes", "_deadline_s", "_exchange", "_head_bytes",
        "_headers", "_host", "_in_message", "_is_closing", "_is_discarding", "_is_dispatching",
        "_is_head_done", "_is_read_paused", "_is_write_paused", "_last_unsent", "_parser", "_refusal",
        "_stalled_since_s", "_transport", "_url", "_waiting",
    )  # fmt: skip

    def __init__(self, host: ConnectionHost) -> None:
        self._host = host
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Exchange | None = None
        self._waiting: deque[HttpRequest] = deque()
        self._headers: dict[bytes, bytes] = _NO_HEADERS
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._in_message = False
        self._is_head_done = False
        self._refusal: ServingError | None = None
        self._is_discarding = False
        self._is_dispatching = False
        self._is_closing = False
        self._is_read_paused = False
        self._is_write_paused = False
        self._backlog: list[bytes] = []
        self._backlog_bytes = 0
        self._stalled_since_s: float | None = None
        self._last_unsent = 0
        self._deadline_s: float | None = None

    # ── asyncio ───────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._host.connections.add(self)
        self._deadline_s = self._host.now_s() + self._host.settings.idle_timeout_s
        if len(self._host.connections) > self._host.settings.max_connections:
            limit = self._host.settings.max_connections
            self._refuse(TooManyConnections(f"{limit} connections are open, the limit", retry_after_s=1.0))

    def connection_lost(self, exc: Exception | None) -> None:
        self._host.connection_ended(self)
        self._is_closing = True
        self._waiting.clear()
        self._backlog.clear()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_gone()
            self._host.exchange_ended()

    def eof_received(self) -> bool:
        if self._in_message and self._exchange is None and not self._is_discarding:
            self._refuse(MalformedHttp(self._cut_short()))
        return False

    def data_received(self, data: bytes) -> None:
        if self._is_discarding or self._is_closing:
            return
        was_in_head = self._in_message and not self._is_head_done
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if self._refusal is None:
                self._refusal = MalformedHttp(f"this is not HTTP/1.1: {error}")
        if was_in_head and self._in_message and not self._is_head_done:
            # Headers still without end after a whole further read: what the parser keeps of an
            # unfinished line it has not told us.
            self._head_bytes += len(data)
            self._check_head()
        if self._waiting:
            self._dispatch()
        if self._refusal is not None and self._exchange is None:
            self._refuse(self._refusal)

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._stalled_since_s = None
        if self._backlog:
            data = b"".join(self._backlog)
            self._backlog.clear()
            self._backlog_bytes = 0
            self._transport.write(data)

    # ── httptools ─────────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        self._in_message = True
        self._headers = {}
        self._url = b""
        self._body = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._deadline_s = self._host.now_s() + self._host.settings.head_timeout_s

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value
        self._head_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        self._is_head_done = True
        self._check_head()
        settings = self._host.settings
        length = self._headers.get(b"content-length")
        if length is None and b"transfer-encoding" not in self._headers:
            return
        self._deadline_s = self._host.now_s() + settings.body_timeout_s
        # llhttp has checked that this is a number.
        if length is not None and int(length) > settings.max_body_bytes:
            self._refuse_body(int(length))
        elif (
            self._headers.get(b"expect", b"").lower() == b"100-continue"
            and self._exchange is None
            and not self._waiting
        ):
            self._transport.write(_CONTINUE)

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > self._host.settings.max_body_bytes:
            self._body.clear()
            self._refuse_body(self._body_bytes)
        elif self._refusal is None:
            self._body.append(data)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._is_head_done = False
        self._deadline_s = None
        if self._refusal is not None or self._parser.should_upgrade():
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        is_keep_alive = self._parser.should_keep_alive()
        is_old = self._parser.get_http_version() == "1.0"
        method, path = self._parser.get_method(), _path_of(self._url)
        self._waiting.append(HttpRequest(method, path, self._headers, body, is_keep_alive, is_old))

    # ── exchanges ─────────────────────────────────────────────────────────────────────────────

    def date(self) -> bytes:
        return self._host.date_line

    def write(self, data: bytes) -> None:
        """A complete answer: it is as large as it is, so only time bounds how long it may wait."""
        if self._backlog:
            self._backlog.append(data)
        elif not self._is_closing:
            self._transport.write(data)

    def write_bounded(self, data: bytes) -> None:
        if self._is_closing:
            return
        if not self._is_write_paused:
            self._transport.write(data)
            return
        self._backlog.append(data)
        self._backlog_bytes += len(data)
        if self._backlog_bytes > self._host.settings.max_unread_bytes:
            self._drop()

    def exchange_done(self, exchange: Exchange, must_close: bool) -> None:
        if self._exchange is not exchange:
            return
        self._exchange = None
        self._host.exchange_ended()
        if must_close or not exchange.request.is_keep_alive:
            self._finish_and_close()
            return
        if not self._in_message:
            self._deadline_s = self._host.now_s() + self._host.settings.idle_timeout_s
        if not self._is_dispatching:
            if self._waiting:
                self._dispatch()
            if self._refusal is not None and self._exchange is None:
                self._refuse(self._refusal)

    def check_deadlines(self, now_s: float) -> None:
        """Called by the door about once a second: no timer per request."""
        unsent = self._transport.get_write_buffer_size()
        if unsent:
            if self._stalled_since_s is None or unsent < self._last_unsent:
                self._stalled_since_s = now_s
            elif now_s - self._stalled_since_s > self._host.settings.write_timeout_s:
                self._drop()
            self._last_unsent = unsent
        else:
            self._stalled_since_s = None
        if self._deadline_s is None or now_s < self._deadline_s or self._exchange is not None:
            return
        if self._in_message and not self._is_discarding:
            self._refuse(TooSlow(self._too_slow()))
        else:
            self._drop()

    @property
    def is_reading_paused(self) -> bool:
        return self._is_read_paused

    def close_if_idle(self) -> None:
        """For draining: a connection between requests has nothing to wait for."""
        if self._exchange is None and not self._in_message and not self._waiting:
            self._transport.close()

    def drop(self) -> None:
        self._drop()

    def _dispatch(self) -> None:
        self._is_dispatching = True
        while self._waiting and self._exchange is None and not self._is_closing:
            exchange = self._host.new_exchange(self, self._waiting.popleft())
            self._exchange = exchange
            self._host.handle(exchange)
        self._is_dispatching = False
        is_full = len(self._waiting) >= self._host.settings.max_pipelined
        if is_full != self._is_read_paused and not self._is_closing:
            self._is_read_paused = is_full
            if is_full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _refuse(self, error: ServingError) -> None:
        """Answer a request that never became one, and end the connection."""
        self._refusal = None
        self._is_discarding = True
        self._in_message = False
        self._host.refused(error)
        request = HttpRequest(b"POST", "", self._headers, b"", True, False)
        exchange = self._host.new_exchange(self, request)
        self._exchange = exchange
        exchange.fail(error, must_close=True)

    def _finish_and_close(self) -> None:
        self._is_closing = True
        self._waiting.clear()
        if self._is_discarding and self._transport.can_write_eof():
            self._transport.write_eof()
            self._deadline_s = self._host.now_s() + self._host.settings.linger_s
        else:
            if self._backlog:
                self._transport.write(b"".join(self._backlog))
                self._backlog.clear()
            self._transport.close()

    def _drop(self) -> None:
        self._is_closing = True
        self._backlog.clear()
        self._transport.abort()

    def _check_head(self) -> None:
        limit = self._host.settings.max_head_bytes
        if self._head_bytes > limit and self._refusal is None:
            self._refusal = HeadTooLarge(f"the headers have {self._head_bytes} bytes or more, limit {limit}")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Java's HTTP client offers h2c on each first request. The parser stops at such an offer and
        would leave the body unread, so the request starts again without it, in a new parser."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refusal = MalformedHttp("this is no proxy: CONNECT is not served")
            return
        kept = b"".join(
            b"%b: %b\r\n" % (name, value)
            for name, value in self._headers.items()
            if name not in (b"upgrade", b"connection", b"http2-settings")
        )
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method, self._url, kept)
        self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(head + rest)
        except httptools.HttpParserError as error:
            self._refusal = MalformedHttp(f"this is not HTTP/1.1: {error}")

    def _refuse_body(self, num_bytes: int) -> None:
        limit = self._host.settings.max_body_bytes
        self._refusal = BodyTooLarge(f"the body has {num_bytes} bytes or more, the limit is {limit}")

    def _cut_short(self) -> str:
        length = self._headers.get(b"content-length")
        if not self._is_head_done:
            return f"the connection ended inside the headers, after {self._head_bytes} bytes"
        expected = f" of {int(length)}" if length is not None else ""
        return f"the connection ended inside the body, after {self._body_bytes}{expected} bytes"

    def _too_slow(self) -> str:
        settings = self._host.settings
        if not self._is_head_done:
            return f"the headers took longer than {settings.head_timeout_s:g} s"
        return f"the body took longer than {settings.body_timeout_s:g} s: {self._body_bytes} bytes arrived"


def _path_of(url: bytes) -> str:
    """Path without query; absolute-form URLs (proxies send them) lose scheme and host."""
    path = url.partition(b"?")[0]
    if not path.startswith(b"/"):
        path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    return path.decode("latin-1")
