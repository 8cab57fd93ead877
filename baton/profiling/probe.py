"""An engine that is asked for single steps: one leg, or one batch, at a time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple, TypeVar

from baton.contract.errors import ErrorReport
from baton.contract.messages import KvEvent, KvSource, SequenceDelta, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.base import Engine, EngineDescription, FinishedPrefill

T = TypeVar("T")

FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 999
"""Ordinary words in every vocabulary we know."""

SKIPPED_STEPS = 2
"""Of a batch, after its last sequence joined."""

LEG_TIMEOUT_S = 120.0


class MeasuringFailed(RuntimeError):
    """A sentence: what the engine did not do."""


class Prefilled(NamedTuple):
    wall_s: float
    """From the order to the answer."""
    step_s: float
    """Of that, in the engine's steps."""
    finished: FinishedPrefill


@dataclass(frozen=True, slots=True)
class DecodeStep:
    seconds: float
    num_context_tokens: int
    """Summed over the batch, in the middle of what was measured."""


class Probe:
    """Owns one engine while it is measured; its listener. Prompts are random, so no cache answers."""

    def __init__(self, engine: Engine, *, seed: int = 0) -> None:
        self.engine = engine
        self._random = random.Random(seed)
        self._num_legs = 0
        self._open: set[str] = set()
        """Decode legs that have not ended."""
        self._leg_ended = asyncio.Event()
        self._finished: dict[str, asyncio.Future[FinishedPrefill]] = {}
        self._on_deltas: Callable[[list[SequenceDelta], float], None] | None = None
        self._failure: asyncio.Future[None]

    async def start(self) -> EngineDescription:
        self._failure = asyncio.get_running_loop().create_future()
        return await self.engine.start(self)

    async def stop(self) -> None:
        await self.engine.stop()
        if self._failure.done():
            self._failure.exception()  # heard, or nobody asked

    def prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num_tokens)]

    async def prefill(self, prompt: list[int], *, keep_kv: bool = False) -> Prefilled:
        leg = self._new_leg()
        future: asyncio.Future[FinishedPrefill] = asyncio.get_running_loop().create_future()
        self._finished[leg] = future
        started_s = time.perf_counter()
        self.engine.start_prefill(
            StartPrefill(
                handoff_id=leg,
                request_id=leg,
                prompt_token_ids=pack_token_ids(prompt),
                sampling=SamplingSpec(max_tokens=2 if keep_kv else 1, temperature=0.0, ignore_eos=True),
                keep_kv=keep_kv,
            )
        )
        finished = await self._or_failure(future)
        return Prefilled(time.perf_counter() - started_s, finished.prefill_s, finished)

    async def first_token_s(self, prompt: list[int], source: KvSource | None) -> float:
        """Of a decode leg that continues from `source`: from the order to its first token."""
        heard: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        def on_deltas(deltas: list[SequenceDelta], now_s: float) -> None:
            if deltas and not heard.done():
                heard.set_result(now_s)

        self._on_deltas = on_deltas
        started_s = time.perf_counter()
        self._start_decode(prompt, source, max_tokens=1)
        ended_s = await self._or_failure(heard)
        await self._until_idle()
        return ended_s - started_s

    async def decode_batch(
        self, num_decodes: int, num_context_tokens: int, *, num_steps: int, max_tokens: int
    ) -> DecodeStep:
        """The median time between steps in which all of `num_decodes` sequences got a token."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stamps: list[float] = []
        num_generated = 0
        at_stamp: list[int] = []

        def on_deltas(deltas: list[SequenceDelta], now_s: float) -> None:
            nonlocal num_generated
            num_generated += sum(len(delta.token_ids) for delta in deltas)
            if len(deltas) != num_decodes:
                stamps.clear()
                at_stamp.clear()
                return
            stamps.append(now_s)
            at_stamp.append(num_generated)
            if len(stamps) > SKIPPED_STEPS + num_steps and not done.done():
                done.set_result(None)

        prompts = [self.prompt(num_context_tokens) for _ in range(num_decodes)]
        self._on_deltas = on_deltas
        legs = []
        try:
            for prompt in prompts:
                legs.append(self._start_decode(prompt, None, max_tokens=max_tokens))
                await asyncio.sleep(0)  # an engine on this loop goes on meanwhile
            await self._or_failure(done)
        finally:
            self._on_deltas = None
            for leg in legs:
                self.engine.abort(leg)
            await self._until_idle()
        kept, tokens = stamps[SKIPPED_STEPS:], at_stamp[SKIPPED_STEPS:]
        gaps = [later - earlier for earlier, later in pairwise(kept)]
        context = num_decodes * num_context_tokens + tokens[len(tokens) // 2]
        return DecodeStep(median(gaps), context)

    def _start_decode(self, prompt: list[int], source: KvSource | None, *, max_tokens: int) -> str:
        leg = self._new_leg()
        self._open.add(leg)
        self.engine.start_decode(
            StartDecode(
                handoff_id=leg,
                request_id=leg,
                prompt_token_ids=pack_token_ids(prompt),
                sampling=SamplingSpec(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
                kv_source=source,
            )
        )
        return leg

    async def _until_idle(self) -> None:
        """Aborts are answered by the engine's next step; a batch still ending would disturb the next."""
        async with asyncio.timeout(LEG_TIMEOUT_S):
            while self._open:
                self._leg_ended.clear()
                await self._leg_ended.wait()

    async def _or_failure(self, future: asyncio.Future[T]) -> T:
        async with asyncio.timeout(LEG_TIMEOUT_S):
            either: list[asyncio.Future[T] | asyncio.Future[None]] = [future, self._failure]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        self._failure.result()
        raise AssertionError("a failure holds an exception")

    def _new_leg(self) -> str:
        self._num_legs += 1
        return f"probe-{self._num_legs}"

    # ── what the engine tells ─────────────────────────────────────────────────────────────────

    def on_step(self, deltas: list[SequenceDelta]) -> None:
        if self._on_deltas is not None:
            self._on_deltas(deltas, time.perf_counter())
        for delta in deltas:
            if delta.finish_reason is not None:
                self._end(delta.handoff_id)

    def on_kv_events(self, events: list[KvEvent]) -> None:
        """Nothing is routed."""

    def on_prefill_finished(self, finished: FinishedPrefill) -> None:
        future = self._finished.pop(finished.delta.handoff_id, None)
        if future is not None and not future.done():
            future.set_result(finished)

    def on_leg_failed(self, handoff_id: str, error: ErrorReport) -> None:
        self._end(handoff_id)
        if error.code != "aborted" and not self._failure.done():
            self._failure.set_exception(MeasuringFailed(f"{error.code}: {error.message}"))

    def on_engine_dead(self, reason: str) -> None:
        if not self._failure.done():
            self._failure.set_exception(MeasuringFailed(f"the engine died: {reason}"))

    def _end(self, leg: str) -> None:
        self._open.discard(leg)
        self._leg_ended.set()
