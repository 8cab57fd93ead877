"""vLLM as an engine: AsyncLLM in this process, its EngineCore (and ranks) in child processes.

A leg is one vLLM request whose id is the handoff id. vLLM's frontend hands each step's outputs out in
one synchronous loop, to whatever object a request was added with; here that object is the leg
itself, so a token costs a method call, with no task or queue per request. The stat logger is called
right after that loop: everything collected since the last call is one step, and is told to the
listener at once, with the load already current.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from vllm import __version__ as vllm_version
from vllm.config import KVEventsConfig, KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from baton.contract.errors import (
    EngineFailed,
    ErrorReport,
    InvalidRequest,
    PromptTooLong,
    ServingError,
    TransferFailed,
    UnsupportedFeature,
)
from baton.contract.lifecycle import RequestState
from baton.contract.messages import (
    BlocksStored,
    KvEvent,
    KvSource,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import num_token_ids, unpack_token_ids
from baton.engine.base import EngineDescription, EngineListener, FinishedPrefill
from baton.engine.vllm.drift import installed_drift
from baton.engine.vllm.given_tokens import read_again
from baton.engine.vllm.held_kv import HeldKv
from baton.engine.vllm.kv_events import VllmKvEvents
from baton.engine.vllm.params import decode_params, output_logprobs, prefill_params, prompt_logprobs
from baton.engine.vllm.settings import (
    VllmEngineSettings,
    choose_side_channel_port,
    engine_arguments,
    set_environment,
    transfer_arguments,
)
from baton.engine.vllm.start import (
    chosen_attention_backend,
    close_sockets,
    construct,
    describe,
    first_line,
    warm_up,
)
from baton.engine.vllm.stats import LoadGauge
from baton.engine.vllm.transfer_params import RELEASE_HELD, held_source, is_held, to_hold, to_read

logger = logging.getLogger("baton.engine")

SHUTDOWN_GRACE_S = 5.0
"""How long vLLM waits for its processes to end by themselves before it kills them."""


@dataclass(slots=True, eq=False)
class _Leg:
    """One vLLM request. vLLM's output processor calls `put` with its outputs or an exception."""

    engine: VllmEngine
    handoff_id: str
    sampling: SamplingSpec
    num_prompt_tokens: int
    is_prefill: bool
    has_kv_source: bool
    is_kv_wanted: bool
    """Prefill: somebody continues after the first token, whatever `max_tokens` says."""
    vllm_id: str = ""

    def put(self, output: Any) -> None:
        self.engine._on_output(self, output)


class VllmEngine:
    """Implements `baton.engine.base.Engine`. One per process: vLLM reads the environment."""

    def __init__(
        self, settings: VllmEngineSettings, *, on_transfer: Callable[[float], None] | None = None
    ) -> None:
        """`on_transfer` hears how long each NIXL read took, in seconds."""
        self._settings = settings
        self._gauge = LoadGauge(on_step_end=self._flush, on_transfer=on_transfer)
        self._kv_events = VllmKvEvents(self._on_kv_events) if settings.is_prefix_caching_enabled else None
        self._llm: Any = None
        self._listener: EngineListener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._legs: dict[str, _Leg] = {}
        self._held = HeldKv(kv_lease_s=settings.kv_lease_s)
        self._pending: list[SequenceDelta] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._supported_tasks: tuple[Any, ...] = ()
        self._max_model_len = 0
        self._kv_bytes_per_block = 0
        self._has_decoded = False
        self._can_stream = False
        self._is_stopping = False
        self._is_dead = False

    # ── start and stop ────────────────────────────────────────────────────────────────────────

    async def start(self, listener: EngineListener) -> EngineDescription:
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        port = choose_side_channel_port(settings)
        set_environment(settings, port)
        started_s = time.monotonic()
        logger.info(
            "engine starting role=%s model=%s device=%s", settings.role.value, settings.model, settings.device
        )
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                self._llm = await construct(self._construct_blocking)
                self._llm._run_output_handler()
                self._llm.output_handler.add_done_callback(self._on_output_handler_ended)
                self._supported_tasks = await self._llm.get_supported_tasks()
                self._can_stream = await self._finds_streaming_possible()
                config = self._llm.vllm_config
                description = describe(
                    settings,
                    config,
                    side_channel_port=port,
                    can_stream=self._can_stream,
                    has_kv_events=self._kv_events is not None,
                    attention_backend=chosen_attention_backend(config),
                )
                self._max_model_len = description.capacity.max_model_len
                self._kv_bytes_per_block = description.capacity.kv_bytes_per_block
                self._gauge.set_capacity(
                    num_blocks=description.capacity.num_blocks, reads_per_transfer=settings.num_ranks
                )
                logger.info("engine loaded took_s=%.1f, warming up", time.monotonic() - started_s)
                if self._kv_events is not None:
                    self._kv_events.connect()
                await warm_up(self._llm, settings.block_size_tokens, self._max_model_len)
                if self._kv_events is not None:
                    await self._kv_events.forget_what_was()
                self._gauge.forget_warm_up()
        except TimeoutError as error:
            await self.stop()
            raise EngineFailed(f"engine was not up after {settings.start_timeout_s:.0f} s") from error
        except BaseException:
            await self.stop()
            raise
        logger.info(
            "engine ready took_s=%.1f num_blocks=%d block_size_tokens=%d transfer_endpoint=%s",
            time.monotonic() - started_s,
            description.capacity.num_blocks,
            description.layout.block_size_tokens,
            description.transfer_endpoint,
        )
        return description

    async def _finds_streaming_possible(self) -> bool:
        if self._settings.transfer != "stream":
            return False
        reasons = [self._settings.reason_not_to_stream]
        if reasons == [None]:  # the ranks know more: they have seen the model's KV
            reasons = await self._llm.collective_rpc("kv_stream_refusal")
        reason = next(filter(None, reasons), None)
        if reason is not None:
            logger.info("kv streaming is not possible here: %s; KV is pulled", reason)
        return reason is None

    def _construct_blocking(self) -> Any:
        arguments = AsyncEngineArgs(
            **engine_arguments(self._settings, has_drifted=self._has_drifted()),
            kv_transfer_config=KVTransferConfig(**transfer_arguments(self._settings)),
            kv_events_config=KVEventsConfig(**self._kv_events.arguments()) if self._kv_events else None,
        )
        return AsyncLLM.from_engine_args(arguments, stat_loggers=[self._gauge.logger_factory()])

    def _has_drifted(self) -> bool:
        if self._settings.scheduler == "fcfs":
            return False
        problems = installed_drift()
        for problem in problems:
            logger.error("scheduler %s is not used: %s", self._settings.scheduler, problem)
        if problems:
            logger.error(
                "vllm %s is not a version this scheduler knows: vLLM's own scheduler runs instead",
                vllm_version,
            )
            self._gauge.count_scheduler_fallback()
        return bool(problems)

    async def stop(self) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        for leg in list(self._legs.values()):
            self._fail(leg, EngineFailed("engine is stopping"))
        if self._llm is not None:
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would report the end of its engine as a failure
                await asyncio.wait([llm.output_handler], timeout=1.0)
            await asyncio.to_thread(llm.shutdown, SHUTDOWN_GRACE_S)
            close_sockets(llm.engine_core.resources)
        if self._kv_events is not None:
            self._kv_events.close()
        for task in self._tasks:
            task.cancel()
        logger.info("engine stopped")

    # ── legs ──────────────────────────────────────────────────────────────────────────────────

    def start_prefill(self, message: StartPrefill) -> None:
        self._start_leg(
            message.handoff_id,
            message.prompt_token_ids,
            message.sampling,
            num_given_tokens=message.num_given_tokens,
            is_prefill=True,
            transfer_params=to_hold(message, can_stream=self._can_stream),
        )

    def start_decode(self, message: StartDecode) -> None:
        self._has_decoded = True
        self._start_leg(
            message.handoff_id,
            message.prompt_token_ids,
            message.sampling,
            num_given_tokens=message.num_given_tokens,
            is_prefill=False,
            transfer_params=to_read(
                message,
                now_s=time.monotonic(),
                margin_s=self._settings.kv_lease_margin_s,
                pull_timeout_s=self._settings.kv_pull_timeout_s,
            ),
        )

    def _start_leg(
        self,
        handoff_id: str,
        packed_token_ids: bytes,
        sampling: SamplingSpec,
        *,
        is_prefill: bool,
        transfer_params: dict[str, Any] | None,
        num_given_tokens: int = 0,
    ) -> None:
        if handoff_id in self._legs:
            logger.error("leg refused, id in use handoff_id=%s", handoff_id)
            return
        leg = _Leg(
            engine=self,
            handoff_id=handoff_id,
            sampling=sampling,
            num_prompt_tokens=0,
            is_prefill=is_prefill,
            has_kv_source=transfer_params is not None and not is_prefill,
            is_kv_wanted=transfer_params is not None and is_prefill,
        )
        self._legs[handoff_id] = leg
        try:
            if self._llm is None or self._is_dead or self._is_stopping:
                raise EngineFailed("engine is not running")
            token_ids = unpack_token_ids(packed_token_ids)
            leg.num_prompt_tokens = len(token_ids)
            self._check_length(len(token_ids))
            make_params = prefill_params if is_prefill else decode_params
            request = self._llm.input_processor.process_inputs(
                handoff_id,
                tokens_input(token_ids),
                make_params(sampling, transfer_params),
                supported_tasks=self._supported_tasks,
            )
            self._llm.input_processor.assign_request_id(request)
            leg.vllm_id = request.request_id
            self._llm.output_processor.add_request(request, None, None, 0, leg)
            if num_given_tokens:
                read_again(self._llm.output_processor, request, num_given_tokens)
            self._send(self._llm.engine_core.add_request_async(request))
        except (ServingError, VLLMClientError, ValueError, TypeError) as error:
            # Told from the loop: a listener is never called from inside a command.
            self._call_soon(self._fail, leg, error)
        except ImportError as error:  # of a package that only some sampling options need
            self._call_soon(self._fail, leg, UnsupportedFeature(f"this installation lacks {error.name}"))
        except Exception:  # not foreseen; the caller tells
            del self._legs[handoff_id]
            raise

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens == 0:
            raise InvalidRequest("prompt is empty", param="prompt")
        if num_tokens >= self._max_model_len:
            raise PromptTooLong(
                f"prompt has {num_tokens} tokens, this engine accepts {self._max_model_len - 1}",
                param="prompt",
            )

    def abort(self, handoff_id: str) -> None:
        if self._llm is None:
            return
        if leg := self._legs.get(handoff_id):
            # vLLM answers with a last output (finish reason "abort"), which ends the leg.
            self._send(self._llm.abort(leg.vllm_id, internal=True))
        elif vllm_id := self._held.take(handoff_id):
            self._release(handoff_id, vllm_id)

    def _release(self, handoff_id: str, vllm_id: str) -> None:
        """Give back held KV now. Carried by a request that vLLM aborts on arrival."""
        self._send(
            self._llm.notify_kv_transfer_request_rejected(f"release-{handoff_id}", {RELEASE_HELD: [vllm_id]})
        )

    def load(self) -> WorkerLoad:
        return self._gauge.load()

    def _on_kv_events(self, events: list[KvEvent]) -> None:
        if not self._has_decoded:  # blocks are filled by prompts alone
            stored = (event for event in events if isinstance(event, BlocksStored))
            self._gauge.count_stored(sum(num_token_ids(event.token_ids) for event in stored))
        self._tell().on_kv_events(events)

    # ── what vLLM tells ───────────────────────────────────────────────────────────────────────

    def _on_output(self, leg: _Leg, output: Any) -> None:
        if self._legs.get(leg.handoff_id) is not leg:
            return
        if isinstance(output, BaseException):
            self._fail(leg, EngineFailed(f"engine failed: {first_line(output)}"))
            return
        completion = output.outputs[0]
        finish_reason = completion.finish_reason if output.finished else None
        if finish_reason == "abort":
            self._fail(leg, None)
        elif finish_reason not in (None, "stop", "length"):
            self._fail(leg, self._error_of(leg, finish_reason))
        elif leg.is_prefill:
            if output.finished:
                self._finish_prefill(leg, output)
        else:
            self._collect(leg, output, finish_reason)

    def _collect(self, leg: _Leg, output: Any, finish_reason: str | None) -> None:
        completion = output.outputs[0]
        if finish_reason is None:
            if not completion.token_ids and not completion.text:
                return
        else:
            del self._legs[leg.handoff_id]
        if not self._pending:
            # In a step `record` comes first and flushes; this is for outputs outside of steps.
            self._call_soon(self._flush)
        self._pending.append(
            SequenceDelta(
                handoff_id=leg.handoff_id,
                token_ids=list(completion.token_ids),
                text=completion.text,
                finish_reason=finish_reason,
                stop_reason=completion.stop_reason if finish_reason is not None else None,
                logprobs=output_logprobs(completion.logprobs),
                # vLLM's count mixes pulled with cached tokens, so only legs without a source have one.
                num_cached_tokens=output.num_cached_tokens
                if finish_reason is not None and not leg.has_kv_source
                else None,
                prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
            )
        )

    def _finish_prefill(self, leg: _Leg, output: Any) -> None:
        del self._legs[leg.handoff_id]
        completion, params = output.outputs[0], output.kv_transfer_params
        is_over = (
            completion.finish_reason == "stop"
            or not leg.is_kv_wanted
            or leg.num_prompt_tokens + 1 >= self._max_model_len
        )
        kv_source = None
        if is_held(params):
            if is_over:
                self._release(leg.handoff_id, leg.vllm_id)
            else:
                kv_source = self._hold(leg, params)
        self._gauge.count_tail(leg.num_prompt_tokens % self._settings.block_size_tokens)
        times = output.metrics
        finished = FinishedPrefill(
            delta=SequenceDelta(
                handoff_id=leg.handoff_id,
                token_ids=list(completion.token_ids),
                text=completion.text,
                # "length" is our one token; the client's own limit decides.
                finish_reason=completion.finish_reason if is_over else None,
                stop_reason=completion.stop_reason if is_over else None,
                logprobs=output_logprobs(completion.logprobs),
                num_cached_tokens=output.num_cached_tokens,
            ),
            kv_source=kv_source,
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
            queue_s=max(0.0, times.scheduled_ts - times.queued_ts) if times else 0.0,
            prefill_s=max(0.0, times.first_token_ts - times.scheduled_ts) if times else 0.0,
        )
        self._flush()
        self._tell().on_prefill_finished(finished)

    def _hold(self, leg: _Leg, params: dict[str, Any]) -> KvSource:
        now_s = time.monotonic()
        source, lease_end_s = held_source(params, now_s=now_s, kv_bytes_per_block=self._kv_bytes_per_block)
        self._held.keep(leg.handoff_id, leg.vllm_id, lease_end_s=lease_end_s, now_s=now_s)
        return source

    def _error_of(self, leg: _Leg, finish_reason: str) -> ServingError:
        if leg.has_kv_source:
            return TransferFailed(
                "KV did not arrive, or too late to be trusted", phase=RequestState.HANDING_OFF.value
            )
        return EngineFailed(f"engine ended the request with {finish_reason!r}")

    def _fail(self, leg: _Leg, error: Exception | None) -> None:
        """Ends the leg for the listener. None: it was aborted."""
        if self._legs.get(leg.handoff_id) is not leg:
            return
        del self._legs[leg.handoff_id]
        self._flush()
        self._tell().on_leg_failed(leg.handoff_id, _report(error))

    def _flush(self) -> None:
        if self._pending:
            deltas, self._pending = self._pending, []
            self._tell().on_step(deltas)

    def _on_output_handler_ended(self, task: asyncio.Task[None]) -> None:
        """vLLM's frontend loop ends only when the engine is dead, or when we stop it."""
        if self._is_stopping or self._is_dead:
            return
        self._is_dead = True
        error = None if task.cancelled() else task.exception()
        reason = f"engine is dead: {first_line(error)}" if error else "engine is dead: its process ended"
        for leg in list(self._legs.values()):
            self._fail(leg, EngineFailed(reason))
        self._tell().on_engine_dead(reason)

    # ── plumbing ──────────────────────────────────────────────────────────────────────────────

    def _tell(self) -> EngineListener:
        assert self._listener is not None
        return self._listener

    def _call_soon(self, callback: Any, *arguments: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon(callback, *arguments)

    def _send(self, command: Coroutine[Any, Any, None]) -> None:
        """Commands reach the engine in the order of these calls: tasks start first in, first out."""
        assert self._loop is not None
        task = self._loop.create_task(self._carry_out(command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, command: Coroutine[Any, Any, None]) -> None:
        try:
            await command
        except EngineDeadError:
            logger.warning("command dropped, engine is dead")


def _report(error: Exception | None) -> ErrorReport:
    if error is None:
        return ErrorReport(code="aborted", message="aborted on request")
    if isinstance(error, ServingError):
        return error.report()
    return InvalidRequest(first_line(error), param=getattr(error, "parameter", None)).report()
