"""A pair of real engines for tests, on an event loop of their own thread. Imported, not collected."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    KvEvent,
    KvSource,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    TokenLogprobs,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.base import EngineDescription, FinishedPrefill

if TYPE_CHECKING:
    from baton.engine.vllm.engine import VllmEngine

T = TypeVar("T")

LEASE_S = 12
LEASE_MARGIN_S = 1.0


@dataclass(frozen=True)
class LegResult:
    """All of one leg, in order."""

    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    last: SequenceDelta | None
    error: ErrorReport | None
    num_deltas: int


async def start_both(
    prefill: Callable[[], Coroutine[Any, Any, T]], decode: Callable[[], Coroutine[Any, Any, T]]
) -> tuple[T, T]:
    """Starts two engines of this process at the same time. vLLM reads the environment, so the second one's
    is set once the first one's child has its own copy."""
    before = set(multiprocessing.active_children())
    async with asyncio.TaskGroup() as starts:
        first = starts.create_task(prefill())
        while not first.done() and before.issuperset(multiprocessing.active_children()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        second = starts.create_task(decode())
    return first.result(), second.result()


@dataclass
class _Collected:
    done: asyncio.Future[Any]
    has_tokens: asyncio.Event = field(default_factory=asyncio.Event)
    deltas: list[SequenceDelta] = field(default_factory=list)


class Recorder:
    """An EngineListener that resolves one future per leg."""

    def __init__(self) -> None:
        self.legs: dict[str, _Collected] = {}
        self.step_sizes: list[int] = []
        self.kv_events: list[KvEvent] = []
        self.died = asyncio.Event()

    def expect(self, handoff_id: str) -> asyncio.Future[Any]:
        self.legs[handoff_id] = _Collected(done=asyncio.get_running_loop().create_future())
        return self.legs[handoff_id].done

    async def first_tokens(self, handoff_id: str) -> None:
        await self.legs[handoff_id].has_tokens.wait()

    def on_step(self, deltas: list[SequenceDelta]) -> None:
        self.step_sizes.append(len(deltas))
        for delta in deltas:
            leg = self.legs[delta.handoff_id]
            leg.deltas.append(delta)
            leg.has_tokens.set()
            if delta.finish_reason is not None:
                leg.done.set_result(self._result(leg, delta, None))

    def on_kv_events(self, events: list[KvEvent]) -> None:
        self.kv_events += events

    def on_prefill_finished(self, finished: FinishedPrefill) -> None:
        self.legs[finished.delta.handoff_id].done.set_result(finished)

    def on_leg_failed(self, handoff_id: str, error: ErrorReport) -> None:
        leg = self.legs[handoff_id]
        leg.done.set_result(self._result(leg, None, error))

    def on_engine_dead(self, reason: str) -> None:
        assert not self.died.is_set()
        self.died.set()

    @staticmethod
    def _result(leg: _Collected, last: SequenceDelta | None, error: ErrorReport | None) -> LegResult:
        return LegResult(
            token_ids=[token for delta in leg.deltas for token in delta.token_ids],
            text="".join(delta.text for delta in leg.deltas),
            logprobs=[entry for delta in leg.deltas for entry in delta.logprobs or []],
            last=last,
            error=error,
            num_deltas=len(leg.deltas),
        )


def begin_prefill(
    engine: VllmEngine,
    listener: Recorder,
    prompt: list[int],
    sampling: SamplingSpec,
    handoff_id: str,
    keep_kv: bool = True,
) -> asyncio.Future[FinishedPrefill | LegResult]:
    done = listener.expect(handoff_id)
    engine.start_prefill(
        StartPrefill(
            handoff_id=handoff_id,
            request_id=handoff_id,
            prompt_token_ids=pack_token_ids(prompt),
            sampling=sampling,
            keep_kv=keep_kv,
        )
    )
    return done


def begin_decode(
    engine: VllmEngine,
    listener: Recorder,
    prompt: list[int],
    sampling: SamplingSpec,
    source: KvSource | None,
    handoff_id: str,
) -> asyncio.Future[LegResult]:
    done = listener.expect(handoff_id)
    engine.start_decode(
        StartDecode(
            handoff_id=handoff_id,
            request_id=handoff_id,
            prompt_token_ids=pack_token_ids(prompt),
            sampling=sampling,
            kv_source=source,
        )
    )
    return done


class EnginePair:
    """A prefill and a decode engine and what a coordinator would do with them."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engines", daemon=True)
        self._thread.start()
        self._num_legs = 0

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 120.0) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    async def start(
        self,
        *,
        prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
        engine_class: type[VllmEngine] | None = None,
        **settings: Any,
    ) -> None:
        from baton.engine.vllm.engine import VllmEngine
        from baton.engine.vllm.settings import VllmEngineSettings

        common: dict[str, Any] = {
            "model": str(self.model),
            "max_model_len": 2048,
            "kv_cache_bytes": 256 << 20,
            "kv_lease_s": LEASE_S,
            "kv_lease_margin_s": LEASE_MARGIN_S,
            "max_batch_size": 16,
            "kv_load_failure_policy": "fail",
        } | settings
        engine_class = engine_class or VllmEngine
        self.prefill_listener, self.decode_listener = Recorder(), Recorder()
        self.prefill: VllmEngine = engine_class(
            VllmEngineSettings(role=WorkerRole.PREFILL, **(common | (prefill or {})))
        )
        self.decode: VllmEngine = engine_class(
            VllmEngineSettings(role=WorkerRole.DECODE, **(common | (decode or {})))
        )
        self.prefill_description: EngineDescription
        self.decode_description: EngineDescription
        self.prefill_description, self.decode_description = await start_both(
            lambda: self.prefill.start(self.prefill_listener), lambda: self.decode.start(self.decode_listener)
        )

    def close(self) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()

    async def _stop(self) -> None:
        await asyncio.gather(self.prefill.stop(), self.decode.stop())

    def new_handoff_id(self) -> str:
        self._num_legs += 1
        return f"h{self._num_legs}"

    async def run_prefill(
        self,
        prompt: list[int],
        sampling: SamplingSpec,
        *,
        handoff_id: str | None = None,
        keep_kv: bool = True,
    ) -> FinishedPrefill | LegResult:
        return await begin_prefill(
            self.prefill,
            self.prefill_listener,
            prompt,
            sampling,
            handoff_id or self.new_handoff_id(),
            keep_kv,
        )

    def begin_decode(
        self, prompt: list[int], sampling: SamplingSpec, source: KvSource | None, handoff_id: str
    ) -> asyncio.Future[LegResult]:
        return begin_decode(self.decode, self.decode_listener, prompt, sampling, source, handoff_id)

    async def run_decode(
        self,
        prompt: list[int],
        sampling: SamplingSpec,
        source: KvSource | None = None,
        *,
        handoff_id: str | None = None,
    ) -> LegResult:
        return await self.begin_decode(prompt, sampling, source, handoff_id or self.new_handoff_id())

    async def handoff(
        self, prompt: list[int], sampling: SamplingSpec, *, first_token_by: WorkerRole = WorkerRole.PREFILL
    ) -> tuple[FinishedPrefill, LegResult]:
        """Prefill, transfer, decode. The result's tokens are the whole answer."""
        import msgspec

        handoff_id = self.new_handoff_id()
        finished = await self.run_prefill(prompt, sampling, handoff_id=handoff_id)
        assert isinstance(finished, FinishedPrefill), finished.error
        assert finished.kv_source is not None
        # As the wire does it: tuples become lists, nothing but plain values survives.
        source = msgspec.msgpack.decode(msgspec.msgpack.encode(finished.kv_source), type=KvSource)
        if first_token_by is WorkerRole.DECODE:
            return finished, await self.run_decode(prompt, sampling, source, handoff_id=handoff_id)
        rest = msgspec.structs.replace(
            sampling, max_tokens=sampling.max_tokens - 1, min_tokens=max(0, sampling.min_tokens - 1)
        )
        first = finished.delta
        result = await self.run_decode([*prompt, *first.token_ids], rest, source, handoff_id=handoff_id)
        return finished, LegResult(
            token_ids=[*first.token_ids, *result.token_ids],
            text=first.text + result.text,
            logprobs=[*(first.logprobs or []), *result.logprobs],
            last=result.last,
            error=result.error,
            num_deltas=result.num_deltas + 1,
        )

    async def colocated(self, prompt: list[int], sampling: SamplingSpec) -> LegResult:
        """The same answer from one engine: the decode engine, with its prefix cache emptied."""
        await self.forget_prefixes()
        return await self.run_decode(prompt, sampling)

    async def forget_prefixes(self) -> None:
        await self.decode._llm.reset_prefix_cache()
        await self.prefill._llm.reset_prefix_cache()

    async def wait_until_free(self, timeout_s: float = LEASE_S / 2) -> None:
        """Until all KV blocks of both engines are free again; what is held by a lease is not."""
        deadline_s = time.monotonic() + timeout_s
        while (free := self.num_free_blocks()) != self.num_blocks():
            assert time.monotonic() < deadline_s, f"free blocks {free}, all {self.num_blocks()}"
            await asyncio.sleep(0.02)

    def num_free_blocks(self) -> tuple[int, int]:
        return self.prefill.load().num_free_blocks, self.decode.load().num_free_blocks

    def num_blocks(self) -> tuple[int, int]:
        return (
            self.prefill_description.capacity.num_blocks,
            self.decode_description.capacity.num_blocks,
        )
