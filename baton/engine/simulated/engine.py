"""An engine without a model, in real time: real queues, batches, KV blocks, prefix cache, leases and
hand-offs; invented tokens.

It is the fake of equal standing beside the vLLM adapter. What a worker computes when, and which blocks it
has, is `baton.simulation`, the same code that replays traces in virtual time; here it gets a clock
(`pace`), tokens (`model`), KV for other workers (`source`) and from them (`destination`). All tokens of a
step are reported in one call, then what the step changed in the prefix cache.

Whether blocks that a hand-off touched may be used or freed is decided by the machines of `baton.handoff`,
the same that decide it between real engines. A leg is over when the listener is told; its blocks may stay
longer.

`faults` and `die` make it misbehave on purpose.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from typing import Any

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
from baton.contract.lifecycle import RequestState
from baton.contract.messages import (
    KvSource,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    TokenLogprobs,
    WorkerLoad,
)
from baton.contract.tokens import TOKEN_BYTES
from baton.engine.base import EngineDescription, EngineListener, FinishedPrefill
from baton.engine.simulated.destination import SimulatedDestination
from baton.engine.simulated.faults import Fault, Faults
from baton.engine.simulated.link import Greeting
from baton.engine.simulated.model import SimulatedSequence, prompt_logprobs, unsupported
from baton.engine.simulated.pace import Pace
from baton.engine.simulated.settings import SimulatedEngineSettings, describe
from baton.engine.simulated.source import SimulatedSource
from baton.policy.prefix_hash import PrefixHasher
from baton.simulation import FinishedLeg, SimulatedWorker, SimulatedWorkerSettings, StepResult

logger = logging.getLogger(__name__)


class _Leg:
    __slots__ = (
        "has_lost_kv",
        "is_deaf",
        "num_prompt_logprobs",
        "sequence",
        "source",
        "started_s",
        "token_fault",
    )

    def __init__(self, sequence: SimulatedSequence, started_s: float) -> None:
        self.sequence = sequence
        self.started_s = started_s
        self.num_prompt_logprobs: int | None = None
        """Still to be given."""
        self.source: KvSource | None = None
        self.has_lost_kv = False
        """To be told with its first token."""
        self.is_deaf = False
        """By a fault: nothing is ever heard of it again."""
        self.token_fault: Fault | None = None
        """To come instead of a token."""

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        if self.num_prompt_logprobs is None:
            return None
        positions = prompt_logprobs(self.sequence.packed_prompt, self.num_prompt_logprobs)
        self.num_prompt_logprobs = None
        return positions


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
        self._worker = SimulatedWorker(
            SimulatedWorkerSettings(
                num_blocks=settings.num_blocks,
                block_size_tokens=settings.block_size_tokens,
                max_batch_size=settings.max_batch_size,
                max_num_batched_tokens=settings.max_num_batched_tokens,
            ),
            settings.step_time,
        )
        self._hasher = PrefixHasher(settings.block_size_tokens)
        self._legs: dict[str, _Leg] = {}
        """In flight; the worker knows each of them too, but for those about to be refused."""
        self._prefill_faults: dict[str, Fault] = {}
        """To come, by leg."""
        self._boot_id = secrets.token_hex(8)
        greeting = Greeting(settings.name, self._boot_id)
        self._source = SimulatedSource(settings, self._clock, self.faults, greeting, self._on_released)
        self._destination = SimulatedDestination(
            self._clock,
            greeting,
            settings.block_size_tokens,
            on_kv=self._on_kv,
            on_no_kv=self._on_no_kv,
            on_free=self._on_released,
        )
        self._num_kv_bytes_received = 0
        self._num_kv_transfers = 0
        self._num_kv_transfer_failures = 0
        self._transfer_endpoint = ""
        self._pace = Pace(self._worker, self._clock, self._report, self._on_blocks, self.die)
        self._listener: EngineListener
        self._loop: asyncio.AbstractEventLoop

    async def start(self, listener: EngineListener) -> EngineDescription:
        settings = self.settings
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        try:
            port = await self._source.start()
        except OSError as error:
            raise EngineFailed(
                f"cannot offer KV on {settings.host}:{settings.transfer_port}: {error}"
            ) from error
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self._transfer_endpoint = f"{host}:{port}"
        return describe(settings, self._transfer_endpoint, self._transfer_params())

    def _transfer_params(self) -> dict[str, Any]:
        return {
            "name": self.settings.name,
            "endpoint": self._transfer_endpoint,
            "boot_id": self._boot_id,
        }

    def start_prefill(self, message: StartPrefill) -> None:
        leg = _Leg(self._sequence(message), self._clock.now_s())
        sequence = leg.sequence
        leg.num_prompt_logprobs = message.sampling.prompt_logprobs
        if not self._begin(leg, message, num_tokens_at_most=sequence.num_prompt_tokens):
            return
        self._worker.add_prefill(
            sequence.handoff_id,
            sequence.num_prompt_tokens,
            self._hashes(leg),
            leg.started_s,
            keep_kv=message.keep_kv,
            packed=sequence.packed_prompt,
        )

    def start_decode(self, message: StartDecode) -> None:
        leg = _Leg(self._sequence(message), self._clock.now_s())
        sequence, source = leg.sequence, message.kv_source
        leg.source = source
        if source is None:
            leg.num_prompt_logprobs = message.sampling.prompt_logprobs
        if not self._begin(leg, message, num_tokens_at_most=sequence.num_tokens_at_most):
            return
        if source is not None:
            self._destination.expect(sequence.handoff_id, source)
        self._worker.add_decode(
            sequence.handoff_id,
            sequence.num_prompt_tokens,
            sequence.num_tokens_at_most - sequence.num_prompt_tokens,
            self._hashes(leg),
            leg.started_s,
            is_kv_on_its_way=source is not None,
            is_streamed=source is not None and source.is_streamed,
            packed=sequence.packed_prompt,
        )

    def abort(self, handoff_id: str) -> None:
        """Also lets go of a finished prefill's hold that nobody has read."""
        leg = self._legs.get(handoff_id)
        if leg is not None:
            if not leg.is_deaf:
                self._fail(handoff_id, Aborted(f"leg {handoff_id} was stopped on request"))
        elif self._source.has(handoff_id):
            self._source.give_up(handoff_id)

    def load(self) -> WorkerLoad:
        self._source.on_time()
        return msgspec.structs.replace(
            self._worker.load(),
            num_kv_bytes_received=self._num_kv_bytes_received,
            num_kv_transfers=self._num_kv_transfers,
            num_kv_transfer_failures=self._num_kv_transfer_failures,
        )

    @property
    def num_stray_writes(self) -> int:
        """Writes of others into blocks that were not promised to them: always 0."""
        return self._destination.num_stray_writes

    async def stop(self) -> None:
        self._fail_all("the engine was stopped", Aborted)
        await self._source.stop()

    def die(self, reason: str) -> None:
        """Fails what runs and tells the listener; nothing works afterwards."""
        self._fail_all(f"the engine died: {reason}", EngineFailed)
        self._listener.on_engine_dead(reason)

    def _fail_all(self, reason: str, kind: type[ServingError]) -> None:
        self._pace.stop()
        for handoff_id in list(self._legs):
            self._fail(handoff_id, kind(reason))
        self._source.close()
        self._destination.stop()

    # ── legs come and go ─────────────────────────────────────────────────────────────────────

    def _sequence(self, message: StartPrefill | StartDecode) -> SimulatedSequence:
        return SimulatedSequence(
            message.handoff_id,
            message.prompt_token_ids,
            message.sampling,
            max_model_len=self.settings.max_model_len,
            mean_output_tokens=self.settings.mean_output_tokens,
            num_given_tokens=message.num_given_tokens,
        )

    def _hashes(self, leg: _Leg) -> list[int]:
        sequence = leg.sequence
        num_blocks = sequence.num_prompt_tokens // self.settings.block_size_tokens
        # Logprobs of the prompt are made of every position: nothing of it may be skipped.
        if not num_blocks or leg.num_prompt_logprobs is not None:
            return []
        return self._hasher.chain(self._hasher.root(), 0, sequence.packed_prompt, num_blocks)

    def _begin(self, leg: _Leg, message: StartPrefill | StartDecode, *, num_tokens_at_most: int) -> bool:
        """False: nothing is to be computed, or not in the usual way."""
        handoff_id = leg.sequence.handoff_id
        assert handoff_id not in self._legs, f"{handoff_id} is in flight"
        self._legs[handoff_id] = leg
        error = self._refusal(leg, message, num_tokens_at_most)
        if error is not None:
            # Not from inside the caller's own call: it has not noted the leg yet.
            self._loop.call_soon(self._fail, handoff_id, error)
            return False
        if isinstance(message, StartPrefill) and message.keep_kv:
            self._source.begin(handoff_id, leg.sequence.packed_prompt)
        self._pace.wake()
        faults = self.faults
        if (fault := faults.at("accept")) is not None:
            leg.is_deaf = fault.action == "ignore"
            self._loop.call_soon(self._strike, handoff_id, fault)
            return False
        if faults.at("queue") is not None:
            return False
        is_computed_here = isinstance(message, StartPrefill) or message.kv_source is None
        prefill_fault = faults.at("prefill") if is_computed_here else None
        leg.token_fault = faults.at("first")
        if isinstance(message, StartDecode):
            leg.token_fault = leg.token_fault or faults.at("token")
        if prefill_fault is None:
            return True
        self._prefill_faults[handoff_id] = prefill_fault
        if prefill_fault.after:
            return True
        # It takes a place and blocks, as if for KV of others, and computes nothing.
        self._worker.add_decode(
            handoff_id, leg.sequence.num_prompt_tokens, 1, [], leg.started_s, is_kv_on_its_way=True
        )
        return False

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
        if not self._worker.can_ever_hold(num_tokens_at_most):
            return PromptTooLong(
                f"prompt and output need {self._worker.settings.num_blocks_for(num_tokens_at_most)} blocks, "
                f"this engine has {self.settings.num_blocks}"
            )
        if (name := unsupported(message.sampling)) is not None:
            return UnsupportedFeature(f"the simulated engine cannot do {name}", param=name)
        return None

    def _strike(self, handoff_id: str, fault: Fault) -> None:
        match fault.action:
            case "stall":
                self._worker.places.freeze(handoff_id)
            case "error":
                self._fail(handoff_id, fault.error())
            case "die":
                # Not from inside a step: it would go on with what is gone.
                self._loop.call_soon(self.die, f"fault {fault.text}")
            case "kill":
                self.faults.kill()

    def _fail(self, handoff_id: str, error: ServingError) -> None:
        if self._legs.pop(handoff_id, None) is None:
            return
        is_source, is_exposed = self._source.has(handoff_id), self._destination.is_exposed(handoff_id)
        self._worker.end_early(handoff_id, keep_blocks=is_source or is_exposed)
        if is_source:
            self._source.give_up(handoff_id)
        self._destination.abort(handoff_id)
        self._pace.wake()
        self._listener.on_leg_failed(handoff_id, error.report())

    # ── KV from and for others ───────────────────────────────────────────────────────────────

    def _on_blocks(self, handoff_id: str) -> None:
        """The leg has blocks for KV that comes from elsewhere."""
        if (fault := self._prefill_faults.pop(handoff_id, None)) is not None:
            self._strike(handoff_id, fault)
            return
        leg, simulated = self._legs[handoff_id], self._worker.leg(handoff_id)
        assert leg.source is not None and simulated is not None
        reserve = functools.partial(
            self._destination.reserve, handoff_id, leg.sequence.packed_prompt, simulated.num_kv_tokens
        )
        params = leg.source.transfer_params
        fault = self.faults.at("transfer", (str(params.get("name")), str(params.get("endpoint"))))
        if fault is None:
            reserve()
            return
        match fault.action:
            case "stall":
                self._destination.abort(handoff_id)
            case "slow":
                reserve(late_s=fault.s)
            case "reset":
                reserve()
                self._destination.reset(handoff_id)
            case "fail":
                self._destination.abort(handoff_id)
                self._on_no_kv(handoff_id, f"fault {fault.text}")

    def _on_kv(self, handoff_id: str, kv: int, num_tokens: int, first_token: int | None) -> None:
        leg, simulated = self._legs[handoff_id], self._worker.leg(handoff_id)
        assert simulated is not None
        num_had = simulated.num_kv_tokens // self.settings.block_size_tokens
        num_blocks = max(0, self._worker.settings.num_blocks_for(num_tokens) - num_had)
        self._num_kv_transfers += 1
        self._num_kv_bytes_received += num_blocks * self.settings.kv_bytes_per_block
        leg.sequence.continue_from(kv, num_tokens)
        self._worker.places.kv_arrived(handoff_id, num_tokens, has_first_token=first_token is not None)
        self._pace.wake()
        if first_token is not None and not self._is_struck(leg):
            delta = leg.sequence.advance(first_token)
            if delta.finish_reason is not None:
                del self._legs[handoff_id]
                self._worker.end_early(handoff_id)
            self._listener.on_step([delta])

    def _on_no_kv(self, handoff_id: str, reason: str) -> None:
        self._num_kv_transfer_failures += 1
        logger.warning("kv not received handoff_id=%s reason=%r", handoff_id, reason)
        if self.settings.kv_load_failure_policy == "fail":
            self._fail(handoff_id, TransferFailed(reason, phase=RequestState.HANDING_OFF.value))
            return
        if self._destination.is_exposed(handoff_id):
            self._worker.places.set_aside(handoff_id)
        else:
            self._legs[handoff_id].has_lost_kv = True
            self._worker.places.kv_lost(handoff_id)
        self._pace.wake()

    def _on_released(self, handoff_id: str) -> None:
        """No hand-off touches these blocks any more."""
        if self._worker.places.release(handoff_id):
            self._pace.wake()

    # ── what came of a step ──────────────────────────────────────────────────────────────────

    def _report(self, result: StepResult) -> None:
        legs = self._legs
        self._offer_progress(result)
        struck = self._strike_prefills() if self._prefill_faults else set()
        finished = {end.leg_id: end for end in result.finished}
        deltas: list[SequenceDelta] = []
        for leg_id, _ in result.tokens:
            leg = legs.get(leg_id)
            if leg is None or leg_id in struck:
                continue
            sequence = leg.sequence
            if self._is_struck(leg):
                continue
            if not sequence.has_kv:
                sequence.compute()
            delta = sequence.advance()
            if leg.num_prompt_logprobs is not None:
                delta = msgspec.structs.replace(delta, prompt_logprobs=leg.take_prompt_logprobs())
            if leg.has_lost_kv:
                leg.has_lost_kv = False
                delta = msgspec.structs.replace(delta, has_lost_kv=True)
            if delta.finish_reason is not None:
                del legs[leg_id]
                num_cached_tokens = self._end(leg_id, finished.get(leg_id))
                if leg.source is not None:
                    # As vLLM, which counts received tokens as cached: neither says it.
                    num_cached_tokens = None
                delta = msgspec.structs.replace(delta, num_cached_tokens=num_cached_tokens)
            deltas.append(delta)
        if deltas:
            self._listener.on_step(deltas)
        if result.events:
            self._listener.on_kv_events(list(result.events))
        elif result.num_prefill_tokens and not deltas and not result.finished_prefills:
            self._listener.on_step([])
        for done in result.finished_prefills:
            if done.leg_id in struck or done.leg_id not in legs:
                continue
            if (fault := legs[done.leg_id].token_fault) is not None:
                self._strike(done.leg_id, fault)
            else:
                self._report_prefill(done, result.end_s)

    def _offer_progress(self, result: StepResult) -> None:
        source = self._source
        for leg_id in result.preempted:
            if source.has(leg_id):
                source.preempted(leg_id)
        for leg_id, num_tokens in self._worker.prefill_progress():
            if source.has(leg_id):
                source.progress(leg_id, num_tokens)

    def _is_struck(self, leg: _Leg) -> bool:
        """A fault came instead of its next token."""
        sequence, fault = leg.sequence, leg.token_fault
        if fault is None or sequence.num_output_tokens < fault.after:
            return False
        self._strike(sequence.handoff_id, fault)
        return True

    def _strike_prefills(self) -> set[str]:
        """Legs whose prompt is far enough."""
        struck = set()
        for leg_id, fault in list(self._prefill_faults.items()):
            simulated = self._worker.leg(leg_id)
            if leg_id not in self._legs:
                del self._prefill_faults[leg_id]
            elif simulated is None or simulated.num_kv_tokens >= fault.after:
                del self._prefill_faults[leg_id]
                struck.add(leg_id)
                self._strike(leg_id, fault)
        return struck

    def _end(self, leg_id: str, finished: FinishedLeg | None) -> int | None:
        """Cached tokens of a leg that is over. One that stopped before its limit has to be stopped: the
        limit is all that the worker knows."""
        if finished is not None:
            return finished.num_cached_tokens
        leg = self._worker.leg(leg_id)
        assert leg is not None
        self._worker.end_early(leg_id)
        return leg.num_cached_tokens

    def _report_prefill(self, done: FinishedLeg, end_s: float) -> None:
        leg = self._legs.pop(done.leg_id)
        sequence = leg.sequence
        sequence.compute()
        now_s = self._clock.now_s()
        delta = msgspec.structs.replace(sequence.advance(), num_cached_tokens=done.num_cached_tokens)
        source = None
        if self._source.has(done.leg_id):
            if delta.finish_reason == "stop":
                self._source.give_up(done.leg_id)
            else:
                self._source.finish(done.leg_id, delta.token_ids[0], self.settings.kv_lease_s)
                source = KvSource(
                    lease_s=max(0.0, end_s + self.settings.kv_lease_s - now_s),
                    num_tokens=sequence.num_prompt_tokens,
                    num_bytes=done.num_held_blocks * self.settings.kv_bytes_per_block,
                    transfer_params=self._transfer_params() | {"handoff_id": done.leg_id},
                )
        self._listener.on_prefill_finished(
            FinishedPrefill(
                delta=delta,
                kv_source=source,
                prompt_logprobs=leg.take_prompt_logprobs(),
                queue_s=max(0.0, done.first_step_s - leg.started_s),
                prefill_s=end_s - done.first_step_s,
            )
        )
