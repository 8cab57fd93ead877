"""Bad input over HTTP: a clear error each, nothing held, still serving."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import pytest

from tests.system.fleet import Fleet


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        pytest.param(b'{"prompt": ', 400, "invalid_request", ["not JSON"], id="broken JSON"),
        pytest.param(b"", 400, "invalid_request", ["empty"], id="no body"),
        pytest.param(b'{"prompt": "\xff\xfe"}', 400, "invalid_request", ["UTF-8"], id="invalid UTF-8"),
        pytest.param(
            b'{"prompt": [1], "prompt_embeds": ' + b"[" * 200_000, 400, "invalid_request", ["nested"],
            id="deep nesting",
        ),
        pytest.param({"prompt": {"a": 1}}, 400, "invalid_request", ["prompt"], id="prompt of a wrong type"),
        pytest.param(
            {"prompt": "a", "max_tokens": "x"}, 400, "invalid_request", ["max_tokens"],
            id="max_tokens as text",
        ),
        pytest.param(
            {"prompt": "a", "max_tokens": 0}, 400, "invalid_request", ["max_tokens", "0"], id="max_tokens 0"
        ),
        pytest.param(
            {"prompt": [1, 2], "max_tokens": 10**9}, 400, "context_length_exceeded",
            ["2 tokens", "1000000000", "2048"], id="max_tokens huge",
        ),
        pytest.param(
            {"prompt": [1, 2], "max_tokens": 10**400}, 400, "context_length_exceeded", ["2048"],
            id="max_tokens beyond 64 bits",
        ),
        pytest.param(
            {"prompt": [1] * 2500}, 400, "context_length_exceeded", ["2500", "2048"], id="prompt too long"
        ),
        pytest.param(
            {"prompt": "word " * 30_000}, 400, "context_length_exceeded", ["2048"], id="text too long"
        ),
        pytest.param({"prompt": "a", "model": "gpt"}, 404, "model_not_found", ["gpt"], id="unknown model"),
        pytest.param(
            {"prompt": "a", "stop": [str(i) for i in range(17)]}, 400, "invalid_request", ["17", "16"],
            id="too many stops",
        ),
        pytest.param({"prompt": [2**31]}, 400, "invalid_request", [str(2**31)], id="unknown token id"),
        pytest.param({"prompt": "a", "n": 10**6}, 400, "invalid_request", ["1000000"], id="n of a million"),
        pytest.param(
            {"prompt": "a", "temperature": "NaN"}, 400, "invalid_request", ["temperature"], id="NaN as text"
        ),
    ],
)  # fmt: skip
def test_a_bad_body_is_refused_before_anything_is_computed(
    fleet: Fleet, body: Any, status: int, code: str, words: list[str]
) -> None:
    num_done = fleet.workers()["prefill-1"]["load"]["num_prefill_tokens_done"]
    answer = fleet.ask("POST", "/v1/completions", body)
    assert (answer.status, answer.error["code"]) == (status, code), answer.body
    assert all(word in answer.error["message"] for word in words), answer.error["message"]
    assert fleet.workers()["prefill-1"]["load"]["num_prefill_tokens_done"] == num_done


def test_ten_megabytes_are_read_and_refused_with_numbers(fleet: Fleet) -> None:
    answer = fleet.complete("x" * (10 << 20))
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert "10485760" in answer.error["message"]
    answer = fleet.complete([7] * 3_000_000)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert "3000000" in answer.error["message"]


def test_more_than_a_body_may_have_is_refused_while_it_is_sent(fleet: Fleet) -> None:
    with socket.create_connection(("127.0.0.1", fleet.http_port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")


REQUEST = json.dumps({"prompt": [9, 9], "max_tokens": 8, "stream": True}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(REQUEST)


@pytest.mark.parametrize("num_sent", [10, len(HEAD), len(HEAD) + 5], ids=["head", "no body", "half a body"])
def test_a_socket_half_closed_inside_a_request_hears_400(fleet: Fleet, num_sent: int) -> None:
    with socket.create_connection(("127.0.0.1", fleet.http_port), timeout=20) as client:
        client.sendall((HEAD + REQUEST)[:num_sent])
        client.shutdown(socket.SHUT_WR)
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_a_socket_half_closed_behind_a_request_holds_nothing(fleet: Fleet) -> None:
    """It may be answered, or taken for a client that left, in the middle of its answer too: then nothing
    that it has looks like an end. The fixture checks that nothing stays."""
    with socket.create_connection(("127.0.0.1", fleet.http_port), timeout=20) as client:
        client.sendall(HEAD + REQUEST)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while data := client.recv(65536):
            received += data
    is_whole = received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert is_whole or (b"[DONE]" not in received and not received.endswith(b"\r\n0\r\n\r\n"))


def test_a_hundred_slow_clients_delay_nobody_and_are_ended(fleet: Fleet) -> None:
    """
    1. a hundred connections send a header byte by byte: meanwhile others are served at once
    2. each hears 408, or is closed, when the time for a head is over
    """
    slow = [socket.create_connection(("127.0.0.1", fleet.http_port), timeout=30) for _ in range(100)]
    try:
        deadline_s = time.monotonic() + 40.0
        ended: set[int] = set()
        while len(ended) < len(slow):
            assert time.monotonic() < deadline_s, f"{len(slow) - len(ended)} slow clients still connected"
            for number, client in enumerate(slow):
                if number not in ended and _trickle(client, b"POST /v1/completions HTTP/1.1\r\nx-slow: "):
                    ended.add(number)
            started_s = time.monotonic()
            assert fleet.complete([1, 2], max_tokens=12, temperature=0).status == 200
            assert time.monotonic() - started_s < 5.0
    finally:
        for client in slow:
            client.close()


def _trickle(client: socket.socket, head: bytes) -> bool:
    """Send the next byte; whether the server has ended the connection."""
    sent = _sent.setdefault(client, 0)
    try:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            data = client.recv(4096)
            assert not data or data.startswith(b"HTTP/1.1 408 ")
            return True
        client.send(head[sent : sent + 1] or b"a")
    except ConnectionError:
        return True
    _sent[client] += 1
    return False


_sent: dict[socket.socket, int] = {}
