"""Messages to bytes and back: MessagePack by msgspec, never pickle.

Unknown fields are ignored, so that a newer peer may add some; a missing or mistyped field is
refused by name, before anything acts on the message.

PROTOCOL_VERSION history
  1  2026-11-21  first version: registration, prefill, decode, client submit
  2  2026-11-21  KV events: KvEvents, AskKvReplay, RegisterWorker.has_kv_events; hits in Placement;
                 role `both`, SequenceDelta.prompt_logprobs, Placement.way,
                 WorkerLoad.scheduler, SamplingSpec.service
  3  2026-11-21  NoMoreLegs answers WorkerLeaving: a worker that drains waits for it; JoinTestPassed,
                 StillThere, num_given_tokens of a leg; SequenceDelta.has_lost_kv,
                 WorkerLoad.num_kv_digest_mismatches
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from baton.contract.errors import ProtocolMismatch
from baton.contract.messages import (
    ClientMessage,
    ClientReply,
    CoordinatorMessage,
    Message,
    WorkerMessage,
)

PROTOCOL_VERSION = 3

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Upper bound of one frame: a prompt of a million tokens is 4 MB."""

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


class Decoder(Generic[M]):
    """Decodes one direction's messages; anything else is refused with a sentence."""

    def __init__(self, message_type: type[M]) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(message_type)

    def decode(self, frame: bytes | memoryview) -> M:
        """Raises ProtocolMismatch: too large, not MessagePack, unknown type, bad or missing field."""
        if len(frame) > MAX_MESSAGE_BYTES:
            raise ProtocolMismatch(f"frame has {len(frame)} bytes, the limit is {MAX_MESSAGE_BYTES}")
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolMismatch(f"frame of {len(frame)} bytes refused: {error}") from error


worker_messages: Decoder[WorkerMessage] = Decoder(WorkerMessage)  # type: ignore[arg-type]
coordinator_messages: Decoder[CoordinatorMessage] = Decoder(CoordinatorMessage)  # type: ignore[arg-type]
client_messages: Decoder[ClientMessage] = Decoder(ClientMessage)  # type: ignore[arg-type]
client_replies: Decoder[ClientReply] = Decoder(ClientReply)  # type: ignore[arg-type]
