"""An engine without a model: real queues, batches, KV blocks, leases and hand-offs, invented tokens.

It is the fake of equal standing beside the vLLM adapter. One task steps it: each step computes up
to `max_num_batched_tokens` (a token for every decoding leg, the rest goes to prompts, oldest
first), takes `step_s` plus the prompts' share at `prefill_tokens_per_s`, and reports all tokens of
the step in one call. Tokens come from `simulated_model`, KV moves by `simulated_transfer`.

Blocks: a leg gets the blocks of its prompt when it is admitted and one more whenever it grows over
a boundary; if none is free, the youngest running leg is preempted and computes everything again
later. A prefill leg's blocks turn into a hold until the reader took the KV or the lease ended.
A decode leg with a source holds its blocks while it fetches; if the KV is not there when the
lease ends, it recomputes or fails (`kv_load_failure_policy`), and what may still arrive is ignored.

`faults` and `die` make it misbehave on purpose.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

import msgspec

from baton.clock import Clock, SystemClock
from baton.contract.errors import (
    Aborted,
    EngineFailed,
    InvalidRequest,
    PromptTooLong,
    ServingError,
    TransferFailed,
    UnsupportedFeature,
)
from baton.contract.messages import (
    KvLayout,
    KvSource,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    WorkerCapacity,
    WorkerLoad,
)
from baton.contract.tokens import TOKEN_BYTES
from baton.engine.base import EngineDescription, EngineListener, FinishedPrefill
from baton.engine.simulated_kv import KvCache
from baton.engine.simulated_model import SimulatedSequence, prompt_logprobs, unsupported
from baton.engine.simulated_settings import (
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_LAYERS,
    Faults,
    SimulatedEngineSettings,
)
from baton.engine.simulated_transfer import KvReader, KvServer

logger = logging.getLogger(__name__)


class _Leg:
    __slots__ = (
        "first_step_s", "hold_id", "is_over", "keep_kv", "late_timer", "num_blocks", "num_left",
        "num_prompt_logprobs", "sequence", "source", "started_s",
    )  # fmt: skip

    def __init__(self, sequence: SimulatedSequence, started_s: float) -> None:
        self.sequence = sequence
        self.started_s = started_s
        self.first_step_s: float | None = None
        self.num_blocks = 0
        self.num_left = sequence.num_prompt_tokens
        """Tokens whose KV must be computed here before the next one can be sampled."""
        self.is_over = False
        self.keep_kv: bool | None = None
        """None for a decode leg."""
        self.num_prompt_logprobs: int | None = None
        self.source: KvSource | None = None
        self.hold_id = ""
        self.late_timer: asyncio.TimerHandle | None = None

    @property
    def handoff_id(self) -> str:
        return self.sequence.handoff_id


class SimulatedEngine:
    """Implements baton.engine.base.Engine."""

    def __init__(
        self,
        settings: SimulatedEngineSettings,
        *,
        clock: Clock | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.settings = settings
        self.faults = faults or Faults()
        self._clock = clock or SystemClock()
        # A leg is in `_legs` and in exactly one of the four places below.
        self._legs: dict[str, _Leg] = {}
        self._waiting: OrderedDict[str, _Leg] = OrderedDict()
        self._running: dict[str, _Leg] = {}
        self._fetching: dict[str, _Leg] = {}
        self._stalled: dict[str, _Leg] = {}
        self._leg_by_hold: dict[str, _Leg] = {}
        self._num_prefill_tokens_done = 0
        self._num_kv_bytes_received = 0
        self._num_kv_transfers = 0
        self._num_kv_transfer_failures = 0
        self._num_preemptions = 0
        self._wake = asyncio.Event()
        self._kv = KvCache(settings.num_blocks, settings.kv_lease_s, self._clock, on_freed=self._wake.set)
        self._server = KvServer(self._kv.read)
        self._reader = KvReader(self._on_read)
        self._transfer_endpoint = ""
        self._task: asyncio.Task[None] | None = None
        self._listener: EngineListener
        self._loop: asyncio.AbstractEventLoop

    async def start(self, listener: EngineListener) -> EngineDescription:
        settings = self.settings
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        try:
            port = await self._server.start(settings.host, settings.transfer_port)
        except OSError as error:
            raise EngineFailed(
                f"cannot offer KV on {settings.host}:{settings.transfer_port}: {error}"
            ) from error
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self._transfer_endpoint = f"{host}:{port}"
        self._task = self._loop.create_task(self._run(), name="simulated engine")
        return EngineDescription(
            layout=KvLayout(
                model=settings.model,
                engine="simulated 1",
                transfer="loopback 1",
                dtype="float32",
                num_layers=NUM_LAYERS,
                num_kv_heads=NUM_KV_HEADS,
                head_dim=HEAD_DIM,
                block_size_tokens=settings.block_size_tokens,
            ),
            capacity=WorkerCapacity(
                num_blocks=settings.num_blocks,
                max_batch_size=settings.max_batch_size,
                max_model_len=settings.max_model_len,
                kv_bytes_per_block=settings.kv_bytes_per_block,
            ),
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            transfer_endpoint=self._transfer_endpoint,
        )

    def start_prefill(self, message: StartPrefill) -> None:
        leg = self._new_leg(message)
        leg.keep_kv = message.keep_kv
        leg.num_prompt_logprobs = message.sampling.prompt_logprobs
        self._begin(leg, message, num_tokens_at_most=leg.sequence.num_prompt_tokens)

    def start_decode(self, message: StartDecode) -> None:
        leg = self._new_leg(message)
        leg.source = message.kv_source
        if leg.source is None:
            leg.num_prompt_logprobs = message.sampling.prompt_logprobs
        if leg.source is not None and self.faults.never_answer != "transfer":
            leg.late_timer = self._loop.call_later(max(0.0, leg.source.lease_s), self._on_late, leg)
        self._begin(leg, message, num_tokens_at_most=leg.sequence.num_tokens_at_most)

    def abort(self, handoff_id: str) -> None:
        """Also lets go of a finished prefill's hold that nobody has read."""
        leg = self._legs.get(handoff_id)
        if leg is not None:
            self._fail(leg, Aborted(f"leg {handoff_id} was stopped on request"))
        else:
            self._kv.let_go(handoff_id)

    def load(self) -> WorkerLoad:
        self._kv.expire()
        num_waiting = len(self._waiting) + len(self._fetching)
        return WorkerLoad(
            num_running=len(self._legs) - num_waiting,
            num_waiting=num_waiting,
            num_free_blocks=self._kv.num_free_blocks,
            num_prefill_tokens_done=self._num_prefill_tokens_done,
            num_kv_bytes_received=self._num_kv_bytes_received,
            num_kv_transfers=self._num_kv_transfers,
            num_kv_transfer_failures=self._num_kv_transfer_failures,
            num_preemptions=self._num_preemptions,
        )

    async def stop(self) -> None:
        self._stop_stepping()
        for leg in list(self._legs.values()):
            self._fail(leg, Aborted("the engine was stopped"))
        await self._server.stop()

    def die(self, reason: str) -> None:
        """Fails what runs and tells the listener; nothing works afterwards."""
        self._stop_stepping()
        for leg in list(self._legs.values()):
            self._fail(leg, EngineFailed(f"the engine died: {reason}"))
        self._listener.on_engine_dead(reason)

    def _stop_stepping(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._kv.stop()
        self._reader.stop()

    # ── legs come and go ─────────────────────────────────────────────────────────────────────

    def _new_leg(self, message: StartPrefill | StartDecode) -> _Leg:
        sequence = SimulatedSequence(
            message.handoff_id,
            message.prompt_token_ids,
            message.sampling,
            max_model_len=self.settings.max_model_len,
            mean_output_tokens=self.settings.mean_output_tokens,
        )
        return _Leg(sequence, self._clock.now_s())

    def _begin(self, leg: _Leg, message: StartPrefill | StartDecode, *, num_tokens_at_most: int) -> None:
        assert leg.handoff_id not in self._legs, f"{leg.handoff_id} is in flight"
        self._legs[leg.handoff_id] = leg
        error = self._refusal(leg, message, num_tokens_at_most)
        if error is None:
            self._waiting[leg.handoff_id] = leg
            self._wake.set()
        else:
            # Not from inside the caller's own call: it has not noted the leg yet.
            self._loop.call_soon(self._fail, leg, error)
        if self.faults.num_legs_until_death is not None:
            if self.faults.num_legs_until_death == 0:
                self._loop.call_soon(self.die, "fault num_legs_until_death")
            self.faults.num_legs_until_death -= 1

    def _refusal(
        self, leg: _Leg, message: StartPrefill | StartDecode, num_tokens_at_most: int
    ) -> ServingError | None:
        num_prompt_tokens, limit = leg.sequence.num_prompt_tokens, self.settings.max_model_len - 1
        if num_prompt_tokens == 0 or len(message.prompt_token_ids) % TOKEN_BYTES:
            return InvalidRequest(
                f"a prompt of {len(message.prompt_token_ids)} bytes is not packed token ids"
            )
        if num_prompt_tokens > limit:
            return PromptTooLong(f"prompt has {num_prompt_tokens} tokens, this engine accepts {limit}")
        if self._num_blocks_for(num_tokens_at_most) > self.settings.num_blocks:
            return PromptTooLong(
                f"prompt and output need {self._num_blocks_for(num_tokens_at_most)} blocks, "
                f"this engine has {self.settings.num_blocks}"
            )
        if (name := unsupported(message.sampling)) is not None:
            return UnsupportedFeature(f"the simulated engine cannot do {name}", param=name)
        if self.faults.num_legs_to_fail > 0:
            self.faults.num_legs_to_fail -= 1
            return EngineFailed("fault num_legs_to_fail")
        return None

    def _end(self, leg: _Leg, *, are_blocks_held: bool = False) -> None:
        leg.is_over = True
        del self._legs[leg.handoff_id]
        for place in (self._running, self._waiting, self._fetching, self._stalled):
            place.pop(leg.handoff_id, None)
        self._forget_source(leg)
        if not are_blocks_held:
            self._kv.free(leg.num_blocks)

    def _fail(self, leg: _Leg, error: ServingError) -> None:
        if not leg.is_over:
            self._end(leg)
            self._listener.on_leg_failed(leg.handoff_id, error.report())

    # ── blocks ─────────────────────────────────────────────────────────────────────

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.settings.block_size_tokens)

    def _grow(self, leg: _Leg) -> None:
        """One more block for a leg that outgrew its own; the youngest leg pays if none is free."""
        if not self._kv.take(1):
            victim = next(reversed(self._running.values()))
            del self._running[victim.handoff_id]
            self._kv.free(victim.num_blocks)
            victim.num_blocks = 0
            victim.num_left = victim.sequence.num_tokens
            self._waiting[victim.handoff_id] = victim
            self._waiting.move_to_end(victim.handoff_id, last=False)
            self._num_preemptions += 1
            if victim is leg:
                return
            self._kv.take(1)
        leg.num_blocks += 1

    # ── fetching KV ──────────────────────────────────────────────────────────────────────────

    def _fetch(self, leg: _Leg) -> None:
        assert leg.source is not None
        self._fetching[leg.handoff_id] = leg
        if self.faults.never_answer == "transfer":
            return
        if self.settings.transfer_s > 0:
            self._loop.call_later(self.settings.transfer_s, self._read, leg)
        else:
            self._read(leg)

    def _read(self, leg: _Leg) -> None:
        if leg.is_over or leg.source is None:
            return
        params = leg.source.transfer_params
        endpoint, hold_id = params.get("endpoint"), params.get("hold_id")
        if not isinstance(endpoint, str) or not isinstance(hold_id, str):
            self._on_no_kv(leg, "transfer_params name no endpoint and hold_id")
        elif not 0 < leg.source.num_tokens <= leg.sequence.num_prompt_tokens or hold_id in self._leg_by_hold:
            self._on_no_kv(leg, f"the source's {leg.source.num_tokens} tokens cannot be this leg's")
        else:
            leg.hold_id = hold_id
            self._leg_by_hold[hold_id] = leg
            self._reader.read(endpoint, hold_id)

    def _on_read(self, hold_id: str, kv: int | None, reason: str) -> None:
        leg = self._leg_by_hold.get(hold_id)
        if leg is None:
            return
        assert leg.source is not None
        if kv is None:
            self._on_no_kv(leg, reason)
        elif self._clock.now_s() >= leg.started_s + leg.source.lease_s:
            self._on_no_kv(leg, f"KV came after the lease of {leg.source.lease_s:.3f} s")
        else:
            num_tokens = leg.source.num_tokens
            self._num_kv_transfers += 1
            self._num_kv_bytes_received += self._num_blocks_for(num_tokens) * self.settings.kv_bytes_per_block
            leg.sequence.continue_from(kv, num_tokens)
            # Logits of the last prompt token do not travel: at least that position is computed here.
            leg.num_left = max(1, leg.sequence.num_prompt_tokens - num_tokens)
            self._forget_source(leg)
            self._run_leg(leg)

    def _on_late(self, leg: _Leg) -> None:
        if not leg.is_over and leg.source is not None:
            self._on_no_kv(leg, f"no KV within the lease of {leg.source.lease_s:.3f} s")

    def _on_no_kv(self, leg: _Leg, reason: str) -> None:
        self._num_kv_transfer_failures += 1
        self._forget_source(leg)
        logger.warning("kv not received handoff_id=%s reason=%r", leg.handoff_id, reason)
        if self.settings.kv_load_failure_policy == "fail":
            self._fail(leg, TransferFailed(reason, phase="transfer"))
        elif leg.handoff_id in self._fetching:
            self._run_leg(leg)
        # A leg that still waits for blocks will compute its prompt when it gets them.

    def _forget_source(self, leg: _Leg) -> None:
        leg.source = None
        self._leg_by_hold.pop(leg.hold_id, None)
        if leg.late_timer is not None:
            leg.late_timer.cancel()
            leg.late_timer = None

    def _run_leg(self, leg: _Leg) -> None:
        self._fetching.pop(leg.handoff_id, None)
        phase = "decode" if leg.keep_kv is None else "prefill"
        place = self._stalled if self.faults.never_answer == phase else self._running
        place[leg.handoff_id] = leg
        self._wake.set()

    # ── stepping ─────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        settings = self.settings
        try:
            while True:
                self._wake.clear()
                ready, num_prompt_tokens = self._plan_step()
                if not ready and not num_prompt_tokens:
                    await self._wake.wait()
                    continue
                step_s = settings.step_s
                if settings.prefill_tokens_per_s is not None:
                    step_s += num_prompt_tokens / settings.prefill_tokens_per_s
                await asyncio.sleep(step_s)
                self._finish_step(ready, num_prompt_tokens)
        except Exception as error:
            logger.exception("simulated engine step failed")
            self.die(f"{type(error).__name__}: {error}")

    def _plan_step(self) -> tuple[list[_Leg], int]:
        """(legs that sample a token in this step, prompt tokens computed in it)"""
        self._kv.expire()
        budget = self.settings.max_num_batched_tokens
        num_prompt_tokens = 0
        ready: list[_Leg] = []
        self._admit()
        for leg in self._running.values():
            if budget <= 0:
                break
            if leg.num_left == 0:
                budget -= 1
                ready.append(leg)
                continue
            if leg.first_step_s is None:
                leg.first_step_s = self._clock.now_s()
            chunk = min(leg.num_left, budget)
            budget -= chunk
            num_prompt_tokens += chunk
            leg.num_left -= chunk
            if leg.num_left == 0:
                ready.append(leg)
        return ready, num_prompt_tokens

    def _admit(self) -> None:
        """Oldest first; a leg that does not fit holds up those behind it, so none starves."""
        num_slots = self.settings.max_batch_size - (len(self._legs) - len(self._waiting))
        while num_slots > 0 and self._waiting:
            leg = next(iter(self._waiting.values()))
            num_blocks = self._num_blocks_for(leg.sequence.num_tokens)
            if not self._kv.take(num_blocks):
                return
            del self._waiting[leg.handoff_id]
            leg.num_blocks = num_blocks
            num_slots -= 1
            if leg.source is None:
                self._run_leg(leg)
            else:
                self._fetch(leg)

    def _finish_step(self, ready: list[_Leg], num_prompt_tokens: int) -> None:
        self._num_prefill_tokens_done += num_prompt_tokens
        block_size_tokens = self.settings.block_size_tokens
        deltas: list[SequenceDelta] = []
        for leg in ready:
            # Aborted while the step ran, or preempted by an older leg a moment ago.
            if leg.is_over or leg.num_left:
                continue
            sequence = leg.sequence
            if not sequence.has_kv:
                sequence.compute()
            if leg.keep_kv is not None:
                self._finish_prefill(leg)
                continue
            delta = sequence.advance()
            if leg.num_prompt_logprobs is not None:
                positions = prompt_logprobs(sequence.packed_prompt, leg.num_prompt_logprobs)
                delta = msgspec.structs.replace(delta, prompt_logprobs=positions)
                leg.num_prompt_logprobs = None
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._end(leg)
            elif sequence.num_tokens > leg.num_blocks * block_size_tokens:
                self._grow(leg)
        if deltas:
            self._listener.on_step(deltas)

    def _finish_prefill(self, leg: _Leg) -> None:
        now_s = self._clock.now_s()
        sequence = leg.sequence
        kv = sequence.kv
        delta = sequence.advance()
        source = None
        is_held = bool(leg.keep_kv) and delta.finish_reason != "stop"
        self._end(leg, are_blocks_held=is_held)
        if is_held:
            hold_id = self._kv.hold(leg.handoff_id, kv, leg.num_blocks)
            source = KvSource(
                lease_s=self.settings.kv_lease_s,
                num_tokens=sequence.num_prompt_tokens,
                num_bytes=leg.num_blocks * self.settings.kv_bytes_per_block,
                transfer_params={"endpoint": self._transfer_endpoint, "hold_id": hold_id},
            )
        logprobs = None
        if leg.num_prompt_logprobs is not None:
            logprobs = prompt_logprobs(sequence.packed_prompt, leg.num_prompt_logprobs)
        assert leg.first_step_s is not None
        self._listener.on_prefill_finished(
            FinishedPrefill(
                delta=delta,
                kv_source=source,
                prompt_logprobs=logprobs,
                queue_s=leg.first_step_s - leg.started_s,
                prefill_s=now_s - leg.first_step_s,
            )
        )
