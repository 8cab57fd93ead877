"""The record is what was sent: also what no server of ours should send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from baton.history import Ask, Chunk, End, Usage
from tests.chaos.client import Job, ask
from tests.chaos.figures import slope_mb_per_min
from tests.chaos.users import asks_again

JOB = Job(name="j", prompt=[1, 2, 3], max_tokens=3, golden=[5, 6, 7])

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(document: Any) -> bytes:
    data = b"data: " + (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(token_id: int, num_so_far: int, finish_reason: str | None = None) -> bytes:
    return event(
        {
            "choices": [{"token_ids": [token_id], "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 3, "completion_tokens": num_so_far},
        }
    )


USAGE = event(
    {
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
        "baton": {"queue_ms": 1.0, "prefill_ms": 2.0, "handoff_ms": 3.0, "decode_ms": 4.0},
    }
)
DONE = event(b"[DONE]")
ERROR = event({"error": {"message": "worker d was lost", "code": "worker_lost", "worker_id": "d"}})
LAST = b"0\r\n\r\n"
WHOLE = (token(5, 1), token(6, 2), token(7, 3, "length"), USAGE, DONE, LAST)


def recorded(
    *parts: bytes, job: Job = JOB, timeout_s: float = 5.0, pause_s: float = 0.002, stays_open: bool = False
) -> Ask:
    """Of a server that sends these, each in a packet of its own, and hangs up."""

    async def scene() -> Ask:
        heard, served = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                await reader.readuntil(b"\r\n\r\n")
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
                if stays_open:
                    await heard.wait()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            served.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            record = await ask(port, job, "j.0", 0, timeout_s)
            heard.set()
            await served.wait()
        return record

    return asyncio.run(scene())


def test_a_stream_that_is_whole():
    record = recorded(STREAM, *WHOLE)
    assert (record.end, record.num_ends, record.finish_reason) == (End.COMPLETED, 1, "length")
    assert record.token_ids == [5, 6, 7]
    assert [chunk.first_index for chunk in record.chunks] == [0, 1, 2]
    assert record.usage == Usage(3, 3)
    assert record.phases is not None and record.phases.decode_s == 0.004


@pytest.mark.parametrize(
    ("parts", "is_so"),
    [
        pytest.param((token(5, 1), token(5, 1), LAST), lambda r: r.chunks[1].first_index == 0, id="repeated"),
        pytest.param((token(5, 1), token(7, 3), LAST), lambda r: r.chunks[1].first_index == 2, id="skipped"),
        pytest.param((*WHOLE[:-1], token(8, 4), LAST), lambda r: r.num_late_events == 1, id="late"),
        pytest.param(
            (token(5, 1, "stop"), token(6, 2, "length"), DONE, LAST), lambda r: r.num_ends == 2, id="two ends"
        ),
        pytest.param((token(5, 1), LAST), lambda r: r.end is End.CONNECTION_LOST, id="closed without an end"),
        pytest.param((token(5, 1),), lambda r: r.end is End.CONNECTION_LOST, id="broken off"),
        pytest.param(
            (token(5, 1), ERROR, DONE, LAST),
            lambda r: r.end is End.FAILED and r.error.code == "worker_lost" and r.num_ends == 1,
            id="an error within",
        ),
    ],
)
def test_what_goes_wrong_within_a_stream(parts: tuple[bytes, ...], is_so: Callable[[Ask], bool]):
    assert is_so(recorded(STREAM, *parts))


def test_silence_is_a_hang_and_progress_is_not():
    """
    1. a server goes silent after a token: hung
    2. one that goes on, slower in all than the longest silence: answered
    """
    assert recorded(STREAM, token(5, 1), timeout_s=0.2, stays_open=True).end is End.HUNG
    record = recorded(STREAM, *WHOLE, timeout_s=1.0, pause_s=0.25)
    assert record.ended_s - record.submitted_s > 1.0
    assert record.end is End.COMPLETED


def test_an_error_instead_of_an_answer():
    body = b'{"error": {"message": "full", "code": "queue_full"}}'
    head = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 3\r\ncontent-type: application/json\r\n"
    record = recorded(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
    assert (record.end, record.status, record.num_ends) == (End.REFUSED, 429, 1)
    assert record.error is not None and record.error.code == "queue_full"
    assert record.headers["retry-after"] == "3" and asks_again(record)


def test_nobody_there():
    async def scene() -> Ask:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return await ask(port, JOB, "j.0", 0, 5.0)

    record = asyncio.run(scene())
    assert (record.end, record.status) == (End.CONNECTION_LOST, None) and asks_again(record)


def test_a_client_that_leaves_is_not_asked_to_ask_again():
    job = Job(name="j", prompt=[1], max_tokens=3, golden=None, leaves_after=2)
    record = recorded(STREAM, *WHOLE, job=job)
    assert record.end is End.LEFT and not asks_again(record)
    assert record.chunks[-1] == Chunk(record.chunks[-1].at_s, 1, [6])


def test_the_slope_of_memory():
    # 3 MB in each of 10 minutes, and one sample far off in the middle of them changes no trend.
    samples = [(60.0 * minute, 100_000_000 + 3_000_000 * minute) for minute in range(11)]
    assert slope_mb_per_min(samples) == pytest.approx(3.0)
