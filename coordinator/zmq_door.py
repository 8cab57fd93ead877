"""The ZeroMQ door: submit, stream, abort, for programs that live beside the fleet.

One ROUTER socket. A client names its requests itself; ids need to be unique among that client's
requests in flight only, so inside the coordinator they carry the connection's number. A client
whose queue is full, or that is gone, is noticed at the next send and its work is aborted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from baton.contract import codec
from baton.contract.errors import (
    Aborted,
    DuplicateRequest,
    InvalidRequest,
    ProtocolMismatch,
    ServingError,
    UnknownModel,
)
from baton.contract.messages import (
    AbortRequest,
    ClientReply,
    Placement,
    RequestDelta,
    RequestFinished,
    RequestRefused,
    RequestReport,
    SequenceDelta,
    SubmitRequest,
)
from baton.contract.sampling import SamplingSpec, check_sampling
from baton.contract.tokens import TOKEN_BYTES, num_token_ids
from baton.wire.channels import RouterChannel
from coordinator.intake import OUR_MISTAKE, Intake, Submission

logger = logging.getLogger("baton.zmq_door")

MAX_REQUEST_ID_CHARS = 256


OnEncoded = Callable[[bytes | ServingError], None]


class PromptEncoder(Protocol):
    """Text to packed token ids, off the event loop; the answer comes as a call on the loop, at once
    or later. Both may also raise ServingError, and then never answer."""

    def encode_text(self, text: str, done: OnEncoded) -> None: ...

    def encode_chat(self, messages: list[dict[str, Any]], done: OnEncoded) -> None: ...

    def check_token_ids(self, packed: bytes, sampling: SamplingSpec | None) -> None:
        """Raises InvalidRequest for an id that the model does not have, where that is known."""


class ZmqDoor:
    def __init__(
        self,
        intake: Intake,
        encoder: PromptEncoder,
        served_names: ServedNames,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        """`on_refused(code)`: for each request that was not accepted."""
        self._intake = intake
        self._on_refused = on_refused
        self._encoder = encoder
        self._served_names = served_names
        self._channel = RouterChannel(self._on_frames)
        self._requests: dict[tuple[bytes, str], _Sink] = {}
        self._num_submitted = 0

    def start(self, address: str) -> str:
        """Returns the bound address. Raises OSError when it is taken."""
        bound = self._channel.bind(address)
        self._channel.start()
        return bound

    def close(self) -> None:
        self._channel.close(linger_ms=500)

    # ── frames in ────────────────────────────────────────────────────────────────────────────

    def _on_frames(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise ProtocolMismatch(f"a message is one frame, got {len(frames)}")
            message = codec.client_messages.decode(frames[0])
        except ProtocolMismatch as error:
            self._refuse(peer, "", error)
            return
        if isinstance(message, AbortRequest):
            sink = self._requests.get((peer, message.request_id))
            if sink is not None:
                sink.abort()
        else:
            self._submit(peer, message)

    def _submit(self, peer: bytes, message: SubmitRequest) -> None:
        key = (peer, message.request_id)
        try:
            self._check(key, message)
        except ServingError as error:
            self._refuse(peer, message.request_id, error)
            return
        self._num_submitted += 1
        internal_id = f"zmq{self._num_submitted}-{message.request_id}"
        sink = self._requests[key] = _Sink(self, peer, message.request_id, internal_id)
        try:
            if message.prompt is not None:
                self._encoder.encode_text(message.prompt, partial(self._encoded, sink, message))
            elif message.messages is not None:
                self._encoder.encode_chat(message.messages, partial(self._encoded, sink, message))
            else:
                self._encoded(sink, message, message.prompt_token_ids or b"")
        except ServingError as error:
            sink.refuse(error)
        except Exception:
            sink.broke()

    def _check(self, key: tuple[bytes, str], message: SubmitRequest) -> None:
        if message.protocol_version != codec.PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"client speaks protocol {message.protocol_version}, "
                f"this coordinator speaks {codec.PROTOCOL_VERSION}"
            )
        if not 0 < len(message.request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                f"request_id has {len(message.request_id)} characters, expected 1 to {MAX_REQUEST_ID_CHARS}",
                param="request_id",
            )
        if key in self._requests:
            raise DuplicateRequest(f"request id {message.request_id!r} is already in flight")
        given = [message.prompt, message.prompt_token_ids, message.messages]
        if sum(item is not None for item in given) != 1:
            raise InvalidRequest("give exactly one of prompt, prompt_token_ids and messages", param="prompt")
        packed = message.prompt_token_ids
        if packed is not None and len(packed) % TOKEN_BYTES:
            raise InvalidRequest(
                f"prompt_token_ids has {len(packed)} bytes, expected a multiple of {TOKEN_BYTES}",
                param="prompt_token_ids",
            )
        if message.model is not None and not self._served_names.is_served(message.model):
            raise UnknownModel(f"model {message.model!r} is not served here", param="model")
        if message.sampling is not None:
            check_sampling(message.sampling)
        self._encoder.check_token_ids(packed or b"", message.sampling)

    def _encoded(self, sink: _Sink, message: SubmitRequest, packed: bytes | ServingError) -> None:
        if isinstance(packed, ServingError):
            sink.refuse(packed)
            return
        if sink.is_aborted:
            sink.refuse(Aborted("aborted before it was accepted"))
            return
        sampling = message.sampling
        if sampling is None:
            limit = self._intake.facts().max_model_len or 0
            sampling = SamplingSpec(max_tokens=max(1, limit - num_token_ids(packed)))
        submission = Submission(request_id=sink.internal_id, prompt_token_ids=packed, sampling=sampling)
        try:
            self._intake.submit(submission, sink)
        except ServingError as error:
            sink.refuse(error)
        except Exception:
            sink.broke()

    # ── replies out ──────────────────────────────────────────────────────────────────────────

    def _reply(self, peer: bytes, message: ClientReply) -> bool:
        return self._channel.send(peer, codec.encode(message))

    def _refuse(self, peer: bytes, request_id: str, error: ServingError) -> None:
        if self._on_refused is not None:
            self._on_refused(error.code)
        self._reply(peer, RequestRefused(request_id=request_id, error=error.report()))

    def _forget(self, sink: _Sink) -> None:
        self._requests.pop((sink.peer, sink.request_id), None)

    def _abort_soon(self, sink: _Sink) -> None:
        """A sink must not call back into the core that is calling it."""
        asyncio.get_running_loop().call_soon(self._intake.abort, sink.internal_id)


class ServedNames(Protocol):
    def is_served(self, name: str) -> bool: ...


class _Sink:
    """One request's way back to its client."""

    __slots__ = ("_door", "internal_id", "is_aborted", "peer", "request_id")

    def __init__(self, door: ZmqDoor, peer: bytes, request_id: str, internal_id: str) -> None:
        self._door = door
        self.peer = peer
        self.request_id = request_id
        self.internal_id = internal_id
        self.is_aborted = False

    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None:
        message = RequestDelta(
            request_id=self.request_id,
            token_ids=delta.token_ids,
            text=delta.text,
            logprobs=delta.logprobs,
        )
        if not self.is_aborted and not self._door._reply(self.peer, message):
            logger.info("client gone request_id=%s", self.internal_id)
            self.abort()

    def on_finished(self, report: RequestReport) -> None:
        self._door._forget(self)
        self._door._reply(self.peer, RequestFinished(request_id=self.request_id, report=report))

    def refuse(self, error: ServingError) -> None:
        self._door._forget(self)
        self._door._refuse(self.peer, self.request_id, error)

    def broke(self) -> None:
        """In an `except` block. A mistake of ours: the client hears that nothing will come."""
        logger.exception("request broke request_id=%s", self.internal_id)
        self.refuse(ServingError(OUR_MISTAKE))

    def abort(self) -> None:
        if not self.is_aborted:
            self.is_aborted = True
            self._door._abort_soon(self)
