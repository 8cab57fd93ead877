"""A door on loopback in front of a fake core, with a tokenizer made on the spot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

from baton.clock import ManualClock
from coordinator.http import HttpDoor, HttpSettings
from coordinator.metrics import Metrics
from coordinator.tokenizer import FleetTokenizer
from tests.coordinator.http.fake_intake import FakeIntake

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}[tools]{{ tools | tojson }}[/tools]{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}[call {{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path) -> str:
    """A byte-level BPE that knows a few words, prepends <s>, and has a chat template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Parsed `data:` events; [DONE] stays a string."""
        lines = [event for event in self.body.decode().split("\n\n") if event]
        assert all(line.startswith("data: ") for line in lines), lines
        return [d if (d := line[6:]) == "[DONE]" else json.loads(d) for line in lines]


@dataclass
class Site:
    """A door that serves."""

    door: HttpDoor
    intake: FakeIntake
    clock: ManualClock
    port: int
    model: str
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def raw(self, data: bytes) -> bytes:
        """Send and read until the server closes."""
        reader, writer = await self.connect()
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 20)

    async def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        reader, writer = await self.connect()
        writer.write(request_bytes(method, path, body, headers))
        answer = await asyncio.wait_for(read_answer(reader, is_head=method == "HEAD"), 20)
        writer.close()
        return answer

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        return await self.ask("POST", path, body, headers)

    async def complete(self, **body: Any) -> Answer:
        return await self.post("/v1/completions", {"prompt": [1, 2, 3], **body})

    async def chat(self, **body: Any) -> Answer:
        return await self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **body}
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Turns of the loop until something happened; bounded by the test's own time limit."""
        for _ in range(20_000):
            if condition():
                return
            await asyncio.sleep(0.0005)
        raise AssertionError("it never happened")


def request_bytes(method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
    payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "test", **(headers or {})}
    if body is not None:
        lines.setdefault("content-length", str(len(payload)))
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    return head.encode() + b"\r\n" + payload


async def read_answer(reader: asyncio.StreamReader, *, is_head: bool = False) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
    status = int(first.split()[1])
    if is_head:
        return Answer(status, headers, b"")
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        assert await reader.readexactly(2) == b"\r\n"
    else:
        body = await reader.readexactly(int(headers["content-length"]))
    return Answer(status, headers, body)


@asynccontextmanager
async def open_site(model: str, **settings: Any) -> AsyncIterator[Site]:
    intake, clock, tokenizer = FakeIntake(), ManualClock(), FleetTokenizer()
    door = HttpDoor(intake, HttpSettings(**settings), tokenizer, Metrics(), clock)
    port = await door.start("127.0.0.1", 0)
    if model:
        tokenizer.start_loading(model)
        assert await tokenizer.loaded()
    site = Site(door, intake, clock, port, model)
    try:
        yield site
    finally:
        for writer in site.writers:
            writer.close()
        await door.close(grace_s=0)
        tokenizer.close()
        assert not door.connections


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def at_site(model: str) -> Callable[..., None]:
    """Runs a scenario against a door; keyword arguments are HttpSettings."""

    def run(
        scenario: Callable[[Site], Awaitable[None]], *, with_tokenizer: bool = True, **settings: Any
    ) -> None:
        async def main() -> None:
            async with open_site(model if with_tokenizer else "", **settings) as site:
                await asyncio.wait_for(scenario(site), 60)

        asyncio.run(main())

    return run
