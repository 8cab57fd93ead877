"""One request over HTTP, written down as its client sees it. Imported, not collected.

Thousands at once from one process: a connection of its own for each request, and no client library between
the bytes and the record.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import cast

import httptools
import msgspec

from baton.contract.errors import ErrorReport
from baton.contract.messages import PhaseTimes
from baton.history import Ask, Chunk, End, Usage

CONNECT_TIMEOUT_S = 5.0
"""As openai-python."""

KEPT_HEADERS = ("x-baton-", "retry-after", "x-request-id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a client wants, and the only right answer to it."""

    name: str
    prompt: list[int]
    max_tokens: int
    golden: list[int] | None
    is_streamed: bool = True
    leaves_after: int | None = None
    """The client hangs up after so many pieces of the answer."""

    def body(self) -> bytes:
        document = {
            "prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        if self.is_streamed:
            options = {"include_usage": True, "continuous_usage_stats": True}
            document |= {"stream": True, "stream_options": options}
        return json.dumps(document).encode()


async def ask(port: int, job: Job, request_id: str, number: int, timeout_s: float) -> Ask:
    """Returns when it is over, however; nothing heard for `timeout_s` is End.HUNG."""
    record = Ask(
        request_id=request_id, job=job.name, number=number, submitted_s=time.time(), end=End.HUNG,
        num_prompt_tokens=len(job.prompt), max_tokens=job.max_tokens, golden=job.golden,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    exchange = _Exchange(_request(job.body(), request_id), record, job.leaves_after)
    transport: asyncio.Transport | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            transport, _ = await loop.create_connection(lambda: exchange, "127.0.0.1", port)
        while not exchange.over.done():
            heard_s = exchange.heard_s
            await asyncio.wait([exchange.over], timeout=timeout_s)
            if exchange.heard_s == heard_s:
                exchange.give_up()
    except (OSError, TimeoutError):
        record.end = End.CONNECTION_LOST
    finally:
        record.ended_s = time.time()
        if transport is not None:
            transport.abort()
    return record


def _request(body: bytes, request_id: str) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"x-request-id: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
    ) % (request_id.encode(), len(body), body)


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str
    code: str | None = None
    phase: str | None = None
    worker_id: str | None = None


class _Told(msgspec.Struct):
    queue_ms: float
    prefill_ms: float
    handoff_ms: float
    decode_ms: float

    def phases(self) -> PhaseTimes:
        return PhaseTimes(
            queue_s=self.queue_ms / 1e3, prefill_s=self.prefill_ms / 1e3,
            handoff_s=self.handoff_ms / 1e3, decode_s=self.decode_ms / 1e3,
        )  # fmt: skip


class _Document(msgspec.Struct):
    """An event of a stream, a whole answer, or an error."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _Error | None = None
    baton: _Told | None = None


_document = msgspec.json.Decoder(_Document)


class _Exchange(asyncio.Protocol):
    """Fills in the record. Also the callbacks of httptools' parser."""

    def __init__(self, request: bytes, record: Ask, leaves_after: int | None) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.heard_s = time.monotonic()
        self._request = request
        self._record = record
        self._leaves_after = leaves_after
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""
        self._is_stream = False
        self._has_done = False
        self._num_tokens = 0

    # ── asyncio ──────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._request)  # uvloop's says so of itself only

    def data_received(self, data: bytes) -> None:
        self.heard_s = time.monotonic()
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(End.CONNECTION_LOST)

    # ── httptools ────────────────────────────────────────────────────────────────────────────

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.decode("latin-1").lower()
        if key.startswith(KEPT_HEADERS):
            self._record.headers[key] = value.decode("latin-1")
        elif key == "content-type":
            self._is_stream = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self._record.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._buffer += body
        if self._is_stream:
            *events, self._buffer = self._buffer.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    self._on_event(event[6:])

    def on_message_complete(self) -> None:
        record = self._record
        if not self._is_stream:
            self._on_whole()
        elif record.error is not None:
            self._end(End.FAILED)
        else:
            is_whole = self._has_done and record.finish_reason is not None
            self._end(End.COMPLETED if is_whole else End.CONNECTION_LOST)

    # ── what it means ────────────────────────────────────────────────────────────────────────

    def _on_event(self, data: bytes) -> None:
        record = self._record
        if self._has_done:
            record.num_late_events += 1
        elif data == b"[DONE]":
            self._has_done = True
        else:
            document = _document.decode(data)
            self._on_choices(document, document.usage)
            if not document.choices:
                record.usage = document.usage
            if document.baton is not None:
                record.phases = document.baton.phases()
            self._on_error(document.error)
        if self._leaves_after is not None and len(record.chunks) >= self._leaves_after:
            self._end(End.LEFT)

    def _on_whole(self) -> None:
        record = self._record
        try:
            document = _document.decode(self._buffer)
        except msgspec.DecodeError:
            document = _Document()  # without a reason: the rules will say so
        if record.status == 200:
            self._on_choices(document, document.usage)
            record.usage = document.usage
            times = (float(record.headers[f"x-baton-{name}-ms"]) for name in
                     ("queue", "prefill", "handoff", "decode"))  # fmt: skip
            record.phases = _Told(*times).phases()
            self._end(End.COMPLETED)
        else:
            record.num_ends = 1
            self._on_error(document.error, is_counted=False)
            self._end(End.REFUSED)

    def _on_choices(self, document: _Document, usage: Usage | None) -> None:
        record = self._record
        for choice in document.choices:
            if choice.token_ids:
                num_new = len(choice.token_ids)
                num_told = self._num_tokens + num_new if usage is None else usage.completion_tokens
                record.chunks.append(Chunk(time.time(), num_told - num_new, choice.token_ids))
                self._num_tokens += num_new
            if choice.finish_reason is not None:
                record.finish_reason = choice.finish_reason
                record.num_ends += 1

    def _on_error(self, error: _Error | None, *, is_counted: bool = True) -> None:
        if error is not None:
            self._record.error = ErrorReport(
                code=error.code or "", message=error.message, phase=error.phase, worker_id=error.worker_id
            )
            self._record.num_ends += is_counted

    def give_up(self) -> None:
        """It stays hung, whatever still comes."""
        self._end(End.HUNG)

    def _end(self, end: End) -> None:
        if not self.over.done():
            self._record.end = end
            self.over.set_result(None)
