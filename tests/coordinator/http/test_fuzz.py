"""Thousands of broken heads and bodies: the door answers or closes, keeps serving, and leaks nothing."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from coordinator.http.openai_schema import ChatBody, CompletionBody
from tests.coordinator.http.conftest import read_answer, request_bytes

NUM_BODIES, NUM_HEADS = 4000, 1500

_LEAVES = [
    None, True, False, 0, 1, -1, 3.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**400, "", "a", "\x00", "😀" * 50,
    [], {}, [1, 2], [[1], [2]], ["a", "b"], [None], {"a": 1}, {"type": "function", "function": {"name": "a"}},
    [{"role": "user", "content": "hi"}], [{"type": "function", "function": {"name": "a"}}], "required",
    {"type": "json_object"}, {"include_usage": True}, {"type": "structural_tag", "format": {"x": [1]}},
]  # fmt: skip


def random_body(dice: random.Random) -> bytes:
    schema = dice.choice([CompletionBody, ChatBody])
    names = dice.sample(schema.__struct_fields__, dice.randint(0, 6))
    body = {name: dice.choice(_LEAVES) for name in names}
    body.setdefault("prompt", [1, 2])
    body.setdefault("messages", [{"role": "user", "content": "hi"}])
    if dice.random() < 0.8:
        body["max_tokens"] = body["max_completion_tokens"] = dice.choice([1, 2, 0, None])
        body["model"] = None
    data = bytearray(json.dumps(body).encode())
    for _ in range(dice.choice([0, 0, 0, 1, 5])):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def test_random_bodies(at_site):
    dice = random.Random(20261121)

    async def scenario(site):
        statuses: dict[int, int] = {}
        reader, writer = await site.connect()
        for _ in range(NUM_BODIES):
            path = dice.choice(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
            writer.write(request_bytes("POST", path, random_body(dice)))
            answer = await asyncio.wait_for(read_answer(reader), 20)
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            if answer.status != 200:
                assert answer.error["message"]
        assert set(statuses) <= {200, 400, 404}, statuses
        assert statuses[200] > NUM_BODIES / 20, statuses
        assert not site.intake.in_flight

    at_site(scenario)


@pytest.mark.timeout(120)
def test_random_heads(at_site):
    """Whole requests with bytes changed, cut off and repeated, on connections that come and go."""
    dice = random.Random(7)
    good = [
        request_bytes("POST", "/v1/completions", {"prompt": [1], "max_tokens": 1}),
        request_bytes("POST", "/v1/completions", {"prompt": [1], "max_tokens": 2, "stream": True}),
        request_bytes("GET", "/health"),
        b'POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"pro\r\n0\r\n\r\n',
    ]

    async def scenario(site):
        async def one() -> None:
            data = bytearray(b"".join(dice.choices(good, k=dice.randint(1, 3))))
            for _ in range(dice.randint(0, 6)):
                position = dice.randrange(len(data))
                match dice.randrange(3):
                    case 0:
                        data[position] = dice.randrange(256)
                    case 1:
                        del data[position : position + dice.randint(1, 20)]
                    case _:
                        data[position:position] = dice.choice(
                            [b"\r\n", b"\x00", b": ", b"9" * 30, b"\r\n\r\n"]
                        )
                if not data:
                    return
            reader, writer = await site.connect()
            cut = dice.randrange(len(data) + 1)
            writer.write(bytes(data[:cut]))
            await asyncio.sleep(0)
            writer.write(bytes(data[cut:]))
            if dice.random() < 0.3:
                writer.transport.abort()
                return
            writer.write_eof()
            try:
                await asyncio.wait_for(reader.read(), 10)
            except ConnectionError:
                pass
            writer.close()

        for _ in range(NUM_HEADS // 10):
            await asyncio.gather(*(one() for _ in range(10)))
        assert (await site.complete(max_tokens=1)).status == 200
        await site.until(lambda: not site.intake.in_flight)
        await site.until(lambda: len(site.door.connections) <= 1)

    at_site(scenario)
