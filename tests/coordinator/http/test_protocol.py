"""One connection, byte by byte: what HTTP allows, and what a stranger may try."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from tests.coordinator.http.conftest import read_answer, request_bytes
from tests.coordinator.http.fake_intake import Script

ONE_TOKEN = {"prompt": [1, 2], "max_tokens": 1}


def test_keep_alive_serves_many_requests_on_one_connection(at_site):
    async def scenario(site):
        reader, writer = await site.connect()
        for number in range(20):
            writer.write(request_bytes("POST", "/v1/completions", {**ONE_TOKEN, "stream": number % 2 == 0}))
            assert (await read_answer(reader)).status == 200
        assert len(site.door.connections) == 1

    at_site(scenario)


def test_pipelined_requests_are_answered_in_order(at_site):
    """The first is the slowest: the others must wait for it, not overtake it."""

    async def scenario(site):
        site.intake.script = lambda s: Script(texts=["x"] * s.sampling.max_tokens)
        reader, writer = await site.connect()
        lengths = [9, 1, 5, 2]
        writer.write(
            b"".join(
                request_bytes("POST", "/v1/completions", {"prompt": [1], "max_tokens": n, "stream": n == 5})
                for n in lengths
            )
            + request_bytes("GET", "/live")
        )
        for length in lengths:
            answer = await read_answer(reader)
            assert answer.status == 200
            if length == 5:
                assert len(answer.events) == 6
            else:
                assert answer.json["usage"]["completion_tokens"] == length
        assert (await read_answer(reader)).json == {"status": "live"}

    at_site(scenario)


def test_too_many_pipelined_requests_wait_unread(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(is_held=True)
        reader, writer = await site.connect()
        writer.write(request_bytes("POST", "/v1/completions", ONE_TOKEN))
        await site.until(lambda: bool(site.intake.in_flight))
        for _ in range(100):
            writer.write(request_bytes("GET", "/live"))
            await asyncio.sleep(0)
        await site.until(lambda: next(iter(site.door.connections)).is_reading_paused)
        site.intake.release()
        for _ in range(101):
            assert (await read_answer(reader)).status == 200

    at_site(scenario)


def test_a_request_in_single_bytes(at_site):
    async def scenario(site):
        reader, writer = await site.connect()
        for byte in request_bytes("POST", "/v1/completions", ONE_TOKEN):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await read_answer(reader)).status == 200

    at_site(scenario)


def test_chunked_bodies(at_site):
    async def scenario(site):
        body = json.dumps(ONE_TOKEN).encode()
        chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (1, bytes([byte])) for byte in body) + b"0\r\n\r\n"
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        reader, writer = await site.connect()
        writer.write(head + chunks)
        assert (await read_answer(reader)).status == 200

    at_site(scenario)


def test_expect_100_continue(at_site):
    async def scenario(site):
        reader, writer = await site.connect()
        message = request_bytes("POST", "/v1/completions", ONE_TOKEN, {"expect": "100-continue"})
        head, _, body = message.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await read_answer(reader)).status == 200

    at_site(scenario)


def test_expect_100_continue_with_a_body_too_large_is_refused_unsent(at_site):
    async def scenario(site):
        head = b"POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
        answer = await site.raw(head)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"99999999" in answer and b"16777216" in answer

    at_site(scenario)


@pytest.mark.parametrize("is_chunked", [False, True], ids=["content-length", "chunked"])
def test_a_body_too_large_hears_413_even_while_it_sends(at_site, is_chunked):
    async def scenario(site):
        reader, writer = await site.connect()
        framing = b"transfer-encoding: chunked" if is_chunked else b"content-length: 3000000"
        writer.write(b"POST /v1/completions HTTP/1.1\r\n" + framing + b"\r\n\r\n")
        piece = b"x" * 65536
        try:
            for _ in range(45):
                writer.write(b"10000\r\n" + piece + b"\r\n" if is_chunked else piece)
                await writer.drain()
        except ConnectionError:
            pass
        answer = await read_answer(reader)
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
        assert "1000000" in answer.error["message"]
        assert answer.headers["connection"] == "close"

    at_site(scenario, max_body_bytes=1_000_000)


def test_endless_headers_hear_431(at_site):
    async def scenario(site):
        for junk in (b"x: " + b"y" * 100_000, b"a: b\r\n" * 20_000):
            reader, writer = await site.connect()
            writer.write(b"GET /live HTTP/1.1\r\n")
            for start in range(0, len(junk), 4096):
                writer.write(junk[start : start + 4096])
                await asyncio.sleep(0)
            answer = await read_answer(reader)
            assert (answer.status, answer.error["code"]) == (431, "headers_too_large")

    at_site(scenario)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"POST /v1/completions HTTP/1.1\r\ncontent-le", "inside the headers"),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 100\r\n\r\n{", "after 1 of 100 bytes"),
        (b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab", "after 2 bytes"),
    ],
    ids=["head", "body", "chunk"],
)
def test_a_socket_half_closed_inside_a_request_hears_400(at_site, sent, words):
    async def scenario(site):
        reader, writer = await site.connect()
        writer.write(sent)
        writer.write_eof()
        answer = await read_answer(reader)
        assert answer.status == 400
        assert words in answer.error["message"]
        assert await reader.read() == b""

    at_site(scenario)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_aborts_all_its_sequences(at_site, is_stream):
    async def scenario(site):
        site.intake.script = lambda s: Script(is_endless=is_stream, is_held=not is_stream)
        reader, writer = await site.connect()
        body = {"prompt": [[1], [2]], "n": 2, "max_tokens": 5, "stream": is_stream}
        writer.write(request_bytes("POST", "/v1/completions", body))
        if is_stream:
            await reader.readuntil(b"data: ")
        await site.until(lambda: len(site.intake.in_flight) == 4)
        writer.close()
        await site.until(lambda: not site.intake.in_flight)
        assert len(site.intake.aborted) == 4
        await site.until(lambda: not site.door.connections)

    at_site(scenario)


def test_a_client_that_leaves_while_its_text_is_encoded_is_never_submitted(at_site):
    async def scenario(site):
        _, writer = await site.connect()
        writer.write(request_bytes("POST", "/v1/completions", {"prompt": "fox " * 400, "max_tokens": 1}))
        await site.until(lambda: bool(site.door.connections))
        writer.transport.abort()
        await site.until(lambda: not site.door.connections)
        assert (await site.complete(max_tokens=1)).status == 200
        assert len(site.intake.submissions) <= 2
        assert not site.intake.in_flight

    at_site(scenario)


def test_a_client_that_does_not_read_is_dropped_at_the_bound(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(is_endless=True, text_size=2000)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", site.port))
        sock.sendall(
            request_bytes("POST", "/v1/completions", {"prompt": [1], "max_tokens": 5, "stream": True})
        )
        await site.until(lambda: bool(site.intake.in_flight))
        await site.until(lambda: not site.intake.in_flight)
        assert len(site.intake.aborted) == 1
        assert not site.door.connections
        sock.close()

    at_site(scenario, max_unread_bytes=200_000)


def test_a_slow_reader_gets_every_token(at_site):
    """Backlogged events leave merged, none lost, in order."""
    texts = [f"{number:05d}" + "x" * 500 for number in range(3000)]

    async def scenario(site):
        site.intake.script = lambda s: Script(texts=texts)
        reader, writer = await site.connect()
        writer.write(request_bytes("POST", "/v1/completions", {"prompt": [1], "stream": True}))
        await site.until(lambda: not site.intake.in_flight)
        answer = await read_answer(reader)
        assert [e["choices"][0]["text"] for e in answer.events[:-1]] == texts

    at_site(scenario)


def test_deadlines(at_site):
    """
    1. headers that never end, a body that never ends: 408 and close
    2. an idle connection is closed without a word; one with a request in flight is not
    """

    async def scenario(site):
        site.intake.script = lambda s: Script(is_held=True)
        slow_head, slow_body, idle, busy = [await site.connect() for _ in range(4)]
        slow_head[1].write(b"GET /live HT")
        slow_body[1].write(b"POST /tokenize HTTP/1.1\r\ncontent-length: 10\r\n\r\n{")
        busy[1].write(request_bytes("POST", "/v1/completions", ONE_TOKEN))
        await site.until(lambda: bool(site.intake.in_flight) and len(site.door.connections) == 4)
        await asyncio.sleep(0.05)
        site.clock.advance(16.0)
        site.door.sweep()
        answer = await read_answer(slow_head[0])
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        site.clock.advance(60.0)
        site.door.sweep()
        answer = await read_answer(slow_body[0])
        assert "1 bytes arrived" in answer.error["message"]
        site.clock.advance(60.0)
        site.door.sweep()
        assert await idle[0].read() == b""
        site.intake.release()
        assert (await read_answer(busy[0])).status == 200

    at_site(scenario)


def test_a_client_that_stops_reading_its_complete_answer_is_dropped_in_time(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(texts=["x" * 8_000_000])
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", site.port))
        sock.sendall(request_bytes("POST", "/v1/completions", ONE_TOKEN))
        await site.until(lambda: bool(site.intake.submissions) and not site.intake.in_flight)
        for _ in range(3):
            site.door.sweep()
            site.clock.advance(61.0)
        await site.until(lambda: not site.door.connections)
        sock.close()

    at_site(scenario)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1e3\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /live HTTP/1.1\r\nbad header\r\n\r\n",
        b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.",
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_not_http_hears_400_and_is_closed(at_site, sent):
    async def scenario(site):
        answer = await site.raw(sent)
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"connection: close\r\n" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_http"
        assert (await site.ask("GET", "/live")).status == 200

    at_site(scenario)


def test_garbage_behind_a_good_request_does_not_spoil_its_answer(at_site):
    async def scenario(site):
        answers = await site.raw(request_bytes("POST", "/v1/completions", ONE_TOKEN) + b"\x00garbage\r\n\r\n")
        assert answers.startswith(b"HTTP/1.1 200 OK")
        assert answers.count(b"HTTP/1.1 400") == 1

    at_site(scenario)


def test_an_offer_to_upgrade_is_ignored(at_site):
    """Java's client sends these with its first request, body included."""
    offer = {"upgrade": "h2c", "connection": "Upgrade, HTTP2-Settings", "http2-settings": "AAEAAEAAAAIAAAAA"}

    async def scenario(site):
        reader, writer = await site.connect()
        for headers in (offer, None):
            writer.write(request_bytes("POST", "/v1/completions", ONE_TOKEN, headers))
            assert (await read_answer(reader)).status == 200
        split = request_bytes("POST", "/v1/completions", ONE_TOKEN, offer)
        writer.write(split[:-5])
        await asyncio.sleep(0.01)
        writer.write(split[-5:])
        assert (await read_answer(reader)).status == 200

    at_site(scenario)


def test_http_1_0_streams_to_the_end_of_the_connection(at_site):
    async def scenario(site):
        body = json.dumps({**ONE_TOKEN, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body)
        answer = await site.raw(head + body)
        head, _, events = answer.partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert events.startswith(b"data: {") and events.endswith(b"data: [DONE]\n\n")

    at_site(scenario)


def test_connection_close_is_kept(at_site):
    async def scenario(site):
        answer = await site.raw(request_bytes("POST", "/v1/completions", ONE_TOKEN, {"connection": "close"}))
        assert b"connection: close\r\n" in answer

    at_site(scenario)


def test_connections_over_the_bound_hear_503(at_site):
    async def scenario(site):
        for _ in range(2):
            await site.connect()
        await site.until(lambda: len(site.door.connections) == 2)
        answer = await site.raw(b"")
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"too_many_connections" in answer

    at_site(scenario, max_connections=2)


def test_a_short_stream_leaves_in_one_write(at_site):
    """Headers, token, usage and [DONE] arrive together: no second packet to wait for."""

    async def scenario(site):
        sock = socket.create_connection(("127.0.0.1", site.port))
        options = {"stream": True, "stream_options": {"include_usage": True}}
        sock.sendall(request_bytes("POST", "/v1/completions", {**ONE_TOKEN, **options}))
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(None, sock.recv, 65536)
        sock.close()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    at_site(scenario)
