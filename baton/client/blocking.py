"""The client of the ZeroMQ door for programs without an event loop: the asyncio client on a loop
of its own, in one background thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from baton.client.asynchronous import AsyncBatonClient, AsyncStream
from baton.client.submission import Prompt
from baton.contract.messages import RequestDelta, RequestReport
from baton.wire.endpoints import DEFAULT_CLIENT_ADDRESS

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished request: its text, its tokens and the coordinator's report on it."""

    text: str
    token_ids: list[int]
    report: RequestReport


class BatonClient:
    """Blocking client; safe to use from several threads. A context manager."""

    def __init__(self, address: str = DEFAULT_CLIENT_ADDRESS, *, timeout_s: float = 300.0) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="baton-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(self._connect(address, timeout_s))
        except BaseException:
            self._stop_loop()
            raise

    def __enter__(self) -> BatonClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stream(self, prompt: Prompt, *, model: str | None = None, **options: Any) -> Iterator[RequestDelta]:
        """Yields tokens as they come; leaving the loop early aborts the request."""
        stream = self._run(self._submit(prompt, model, options))
        try:
            while (delta := self._run(_next(stream))) is not None:
                yield delta
        finally:
            self._loop.call_soon_threadsafe(stream.abort)

    def generate(self, prompt: Prompt, *, model: str | None = None, **options: Any) -> Generation:
        """Waits for the whole answer."""
        return self._run(self._generate(prompt, model, options))

    def close(self) -> None:
        """Abort what still runs and disconnect. Idempotent."""
        if self._thread.is_alive():
            self._run(_call(self._client.close))
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _connect(self, address: str, timeout_s: float) -> AsyncBatonClient:
        return AsyncBatonClient(address, timeout_s=timeout_s)

    async def _submit(self, prompt: Prompt, model: str | None, options: dict[str, Any]) -> AsyncStream:
        return self._client.submit(prompt, model=model, **options)

    async def _generate(self, prompt: Prompt, model: str | None, options: dict[str, Any]) -> Generation:
        stream = self._client.submit(prompt, model=model, **options)
        texts: list[str] = []
        token_ids: list[int] = []
        async for delta in stream:
            texts.append(delta.text)
            token_ids += delta.token_ids
        assert stream.report is not None
        return Generation(text="".join(texts), token_ids=token_ids, report=stream.report)


async def _next(stream: AsyncStream) -> RequestDelta | None:
    try:
        return await stream.__anext__()
    except StopAsyncIteration:
        return None


async def _call(function: Any) -> None:
    function()
