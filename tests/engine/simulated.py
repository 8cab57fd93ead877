"""Simulated engines by hand: one that runs, who listens, what they are told. Imported, not collected."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator

import uvloop

from baton.contract.messages import KvSource, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.engine.base import EngineDescription
from baton.engine.simulated.engine import SimulatedEngine
from baton.engine.simulated.model import SimulatedSequence
from baton.engine.simulated.settings import SimulatedEngineSettings

DEADLINE_S = 20.0


def in_loop(test):
    """Runs an async test on the workers' event loop, with a deadline."""

    @functools.wraps(test)
    def run(**arguments):
        async def with_deadline():
            async with asyncio.timeout(DEADLINE_S):
                await test(**arguments)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(with_deadline())

    return run


class Heard:
    """A listener; `await until(...)` waits for what it hears."""

    def __init__(self):
        self.tokens, self.text, self.last = {}, {}, {}
        self.kv_events = []
        self.prefills, self.failures = {}, {}
        self.death = None
        self.description: EngineDescription
        self.order = []
        self._news = asyncio.Event()

    def on_step(self, deltas):
        for delta in deltas:
            self.tokens.setdefault(delta.handoff_id, []).extend(delta.token_ids)
            self.text[delta.handoff_id] = self.text.get(delta.handoff_id, "") + delta.text
            if delta.finish_reason is not None:
                self.last[delta.handoff_id] = delta
                self.order.append(delta.handoff_id)
        self._news.set()

    def on_prefill_finished(self, finished):
        self.prefills[finished.delta.handoff_id] = finished
        self.order.append(finished.delta.handoff_id)
        self._news.set()

    def on_kv_events(self, events):
        self.kv_events += events

    def on_leg_failed(self, handoff_id, error):
        self.failures[handoff_id] = error
        self.order.append(handoff_id)
        self._news.set()

    def on_engine_dead(self, reason):
        self.death = reason
        self._news.set()

    async def until(self, condition):
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def ended(self, *handoff_ids):
        await self.until(lambda: all(handoff_id in self.order for handoff_id in handoff_ids))


@contextlib.asynccontextmanager
async def running(clock=None, faults=None, **settings) -> AsyncIterator[tuple[SimulatedEngine, Heard]]:
    base = {"block_size_tokens": 16, "num_blocks": 64, "max_model_len": 512}
    engine = SimulatedEngine(SimulatedEngineSettings(**base | settings), clock=clock, faults=faults)
    heard = Heard()
    heard.description = await engine.start(heard)
    try:
        yield engine, heard
    finally:
        await engine.stop()


async def all_free(*engines):
    """Blocks that a hand-off touched may stay a while after their leg: until the other side has agreed."""
    while any(engine.load().num_free_blocks != engine.settings.num_blocks for engine in engines):  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def spec(**sampling):
    return SamplingSpec(**{"max_tokens": 8, "temperature": 0.0} | sampling)


def prefill(handoff_id, prompt, **sampling):
    return StartPrefill(
        handoff_id=handoff_id, request_id="r", prompt_token_ids=pack_token_ids(prompt),
        sampling=spec(**sampling), keep_kv=True,
    )  # fmt: skip


def decode(handoff_id, prompt, source=None, **sampling):
    return StartDecode(
        handoff_id=handoff_id, request_id="r", prompt_token_ids=pack_token_ids(prompt),
        sampling=spec(**sampling), kv_source=source,
    )  # fmt: skip


def stream_from(heard, num_tokens, lease_s=60.0, *, has_first_token=False):
    """What a decode worker is told when the prefill begins."""
    params = heard.description.stream_params
    return KvSource(
        lease_s=lease_s,
        num_tokens=num_tokens,
        num_bytes=0,
        transfer_params=params,
        is_streamed=True,
        has_first_token=has_first_token,
    )


def generated(prompt, **sampling):
    """(tokens, text, last delta) of a sequence, without an engine."""
    mean = sampling.pop("mean_output_tokens", None)
    sequence = SimulatedSequence(
        "h", pack_token_ids(prompt), spec(**sampling), max_model_len=512, mean_output_tokens=mean
    )
    sequence.compute()
    deltas = [sequence.advance()]
    while deltas[-1].finish_reason is None:
        deltas.append(sequence.advance())
    return [t for d in deltas for t in d.token_ids], "".join(d.text for d in deltas), deltas[-1]
