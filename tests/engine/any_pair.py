"""A prefill and a decode engine of either kind, with all they say kept in order. Imported, not collected."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import KvEvent, SequenceDelta, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.base import Engine, EngineDescription, FinishedPrefill
from tests.engine.pair import start_both

T = TypeVar("T")

DEADLINE_S = 120.0
BLOCK = 32
MAX_MODEL_LEN = 512


class Recorder:
    """An engine's listener that remembers everything, in order."""

    def __init__(self) -> None:
        self.steps: list[list[SequenceDelta]] = []
        self.prefills: dict[str, FinishedPrefill] = {}
        self.failures: dict[str, ErrorReport] = {}
        self.ends: dict[str, int] = {}
        self.deaths: list[str] = []
        self.kv_events: list[KvEvent] = []
        self._news = asyncio.Event()

    def on_step(self, deltas: list[SequenceDelta]) -> None:
        self.steps.append(deltas)
        for delta in deltas:
            if delta.finish_reason is not None:
                self._ended(delta.handoff_id)
        self._news.set()

    def on_prefill_finished(self, finished: FinishedPrefill) -> None:
        self.prefills[finished.delta.handoff_id] = finished
        self._ended(finished.delta.handoff_id)

    def on_kv_events(self, events: list[KvEvent]) -> None:
        self.kv_events += events

    def on_leg_failed(self, handoff_id: str, error: ErrorReport) -> None:
        self.failures[handoff_id] = error
        self._ended(handoff_id)

    def on_engine_dead(self, reason: str) -> None:
        self.deaths.append(reason)
        self._news.set()

    def _ended(self, handoff_id: str) -> None:
        self.ends[handoff_id] = self.ends.get(handoff_id, 0) + 1
        self._news.set()

    def deltas(self, handoff_id: str) -> list[SequenceDelta]:
        return [delta for step in self.steps for delta in step if delta.handoff_id == handoff_id]

    def tokens(self, handoff_id: str) -> list[int]:
        return [token for delta in self.deltas(handoff_id) for token in delta.token_ids]

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()


class Pair:
    """A prefill and a decode engine, their recorders, and the loop they live on."""

    def __init__(self, runner: asyncio.Runner, prefill: Engine, decode: Engine) -> None:
        self._runner = runner
        self.prefill, self.decode = prefill, decode
        self.prefill_heard, self.decode_heard = Recorder(), Recorder()
        self._numbers = itertools.count(1)
        self._dice = random.Random(11)

    def run(self, work: Awaitable[T]) -> T:
        async def with_deadline() -> T:
            async with asyncio.timeout(DEADLINE_S):
                return await work

        return self._runner.run(with_deadline())

    async def start(self) -> None:
        self.prefill_is: EngineDescription
        self.decode_is: EngineDescription
        self.prefill_is, self.decode_is = await start_both(
            lambda: self.prefill.start(self.prefill_heard), lambda: self.decode.start(self.decode_heard)
        )

    async def stop(self) -> None:
        await self.prefill.stop()
        await self.decode.stop()

    def new_id(self) -> str:
        return f"h{next(self._numbers)}"

    def new_prompt(self, num_tokens: int) -> list[int]:
        return [self._dice.randrange(100, 400) for _ in range(num_tokens)]

    async def run_prefill(
        self, prompt: list[int], *, keep_kv: bool = True, **sampling: Any
    ) -> FinishedPrefill:
        handoff_id = self.new_id()
        self.prefill.start_prefill(prefill_message(handoff_id, prompt, keep_kv=keep_kv, **sampling))
        await self.prefill_heard.until(lambda: handoff_id in self.prefill_heard.ends)
        return self.prefill_heard.prefills[handoff_id]

    async def run_decode(
        self, prompt: list[int], finished: FinishedPrefill | None = None, **sampling: Any
    ) -> list[SequenceDelta]:
        """With `finished`, from its KV; otherwise computed by the decode engine."""
        handoff_id = finished.delta.handoff_id if finished else self.new_id()
        source = finished.kv_source if finished else None
        self.decode.start_decode(decode_message(handoff_id, prompt, source, **sampling))
        await self.decode_heard.until(lambda: handoff_id in self.decode_heard.ends)
        assert handoff_id not in self.decode_heard.failures, self.decode_heard.failures[handoff_id]
        return self.decode_heard.deltas(handoff_id)

    async def all_free(self) -> None:
        """Both engines have all blocks back. A real one counts at its next step, so this looks again."""
        for engine, description in ((self.prefill, self.prefill_is), (self.decode, self.decode_is)):
            while engine.load().num_free_blocks != description.capacity.num_blocks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def spec(**sampling: Any) -> SamplingSpec:
    return SamplingSpec(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | sampling)


def prefill_message(
    handoff_id: str, prompt: list[int], *, keep_kv: bool = True, **sampling: Any
) -> StartPrefill:
    return StartPrefill(
        handoff_id=handoff_id, request_id=f"r-{handoff_id}", prompt_token_ids=pack_token_ids(prompt),
        sampling=spec(**sampling), keep_kv=keep_kv,
    )  # fmt: skip


def decode_message(handoff_id: str, prompt: list[int], source: Any = None, **sampling: Any) -> StartDecode:
    return StartDecode(
        handoff_id=handoff_id, request_id=f"r-{handoff_id}", prompt_token_ids=pack_token_ids(prompt),
        sampling=spec(**sampling), kv_source=source,
    )  # fmt: skip


def tokens_of(deltas: list[SequenceDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def simulated_engines() -> tuple[Engine, Engine]:
    from baton.engine.simulated.engine import SimulatedEngine
    from baton.engine.simulated.settings import SimulatedEngineSettings

    settings = SimulatedEngineSettings(block_size_tokens=BLOCK, max_model_len=MAX_MODEL_LEN, num_blocks=512)
    return SimulatedEngine(settings), SimulatedEngine(settings)


def vllm_engines(model: str) -> tuple[Engine, Engine]:
    from baton.engine.vllm.engine import VllmEngine
    from baton.engine.vllm.settings import VllmEngineSettings

    def engine(role: WorkerRole) -> Engine:
        return VllmEngine(
            VllmEngineSettings(
                model=model, role=role, dtype="float32", max_model_len=MAX_MODEL_LEN,
                block_size_tokens=BLOCK, kv_cache_bytes=128 << 20,
            )
        )  # fmt: skip

    return engine(WorkerRole.PREFILL), engine(WorkerRole.DECODE)
