"""What the two ends of a stream say to each other, as bytes inside NIXL notifications. Pure.

Every message begins with `PREFIX`, which vLLM's own notices ("<request id>:<count>", "HB:…") never do,
and carries the version in it: a peer of another version is not understood and says nothing, which the
destination's silence deadline turns into an error. All are safe to repeat.
"""

from __future__ import annotations

import msgspec

PREFIX = b"baton-stream/2:"


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    pass


class Hello(_Message, frozen=True):
    """Destination rank → source rank, before its first registration: who it is and where its KV lies."""

    destination: str
    """Its NIXL agent's name, new with every boot."""
    agent_metadata: bytes
    tp_rank: int
    tp_size: int
    device_id: int
    num_blocks: int
    base_addresses: list[int]
    """Per layer."""
    block_bytes: list[int]
    block_strides: list[int]


class RegisterStream(_Message, frozen=True):
    handoff_id: str
    destination: str
    epoch: int
    num_destinations: int
    """Ranks of the decode worker that this source rank serves."""
    num_skipped: int
    block_ids: list[int]
    ttl_s: float
    wants_first_token: bool


class CancelStream(_Message, frozen=True):
    handoff_id: str
    destination: str
    epoch: int


class StreamKnown(_Message, frozen=True):
    handoff_id: str
    source: str
    epoch: int


class BlocksWritten(_Message, frozen=True):
    """Rides on a WRITE: NIXL delivers it after the bytes."""

    handoff_id: str
    source: str
    epoch: int
    seq: int
    total: int


class FirstToken(_Message, frozen=True):
    """What the prompt's last position gave, for a destination that wants it."""

    handoff_id: str
    source: str
    epoch: int
    token_id: int


class StreamFailed(_Message, frozen=True):
    """Nothing of this stream is in flight and nothing more will be written."""

    handoff_id: str
    source: str
    epoch: int
    reason: str


class CancelDone(_Message, frozen=True):
    """As StreamFailed, on request."""

    handoff_id: str
    source: str
    epoch: int


ToSource = Hello | RegisterStream | CancelStream
ToDestination = StreamKnown | BlocksWritten | FirstToken | StreamFailed | CancelDone
StreamMessage = ToSource | ToDestination

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[StreamMessage] = msgspec.msgpack.Decoder(StreamMessage)


def encode(message: StreamMessage) -> bytes:
    return PREFIX + _encoder.encode(message)


def decode(data: bytes) -> StreamMessage:
    """Raises ValueError: not a message of this version."""
    if not data.startswith(PREFIX):
        raise ValueError("not a stream message")
    try:
        return _decoder.decode(memoryview(data)[len(PREFIX) :])
    except msgspec.MsgspecError as error:
        raise ValueError(f"stream message does not decode: {error}") from error
