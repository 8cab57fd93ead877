"""Bytes on the wire: golden frames, and refusal of everything that is not one of ours."""

from __future__ import annotations

import pickle
import random

import msgspec
import pytest

from baton.contract import codec, messages
from baton.contract.errors import ERROR_TYPES, ErrorReport, ProtocolMismatch, error_from_report
from baton.contract.messages import (
    AbortLeg,
    KvSource,
    SequenceDelta,
    StartDecode,
    StepOutputs,
    SubmitRequest,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import num_token_ids, pack_token_ids, unpack_token_ids

GOLDEN = [
    (AbortLeg(handoff_id="h1"), "82a474797065a841626f72744c6567aa68616e646f66665f6964a26831"),
    (
        StepOutputs(deltas=[SequenceDelta("h1", [7], "a")], load=WorkerLoad(num_running=1)),
        "83a474797065ab537465704f757470757473a664656c7461739199a268319107a161c0c0c0c0c0c2"
        "a46c6f61649a0100000000000000c000",
    ),
]


@pytest.mark.parametrize(("message", "frame"), GOLDEN, ids=lambda v: type(v).__name__)
def test_golden_bytes(message, frame):
    """A change here changes the protocol: raise PROTOCOL_VERSION and tell its history."""
    assert codec.encode(message).hex() == frame


def test_round_trip():
    message = StartDecode(
        handoff_id="h", request_id="r", prompt_token_ids=pack_token_ids([1, 2**32 - 1]),
        sampling=SamplingSpec(max_tokens=3, stop=["é"], logit_bias={5: 1.0}),
        kv_source=KvSource(lease_s=1.5, num_tokens=2, num_bytes=8, transfer_params={"a": [[1], {"b": None}]}),
    )  # fmt: skip
    assert codec.coordinator_messages.decode(codec.encode(message)) == message


def test_unknown_fields_are_ignored_and_missing_ones_named():
    frame = msgspec.msgpack.encode({"type": "AbortLeg", "handoff_id": "h", "from_the_future": 1})
    assert codec.coordinator_messages.decode(frame) == AbortLeg(handoff_id="h")
    with pytest.raises(ProtocolMismatch, match="missing required field `handoff_id`"):
        codec.coordinator_messages.decode(msgspec.msgpack.encode({"type": "AbortLeg"}))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="empty"),
        pytest.param(pickle.dumps({"type": "AbortLeg"}), id="pickle"),
        pytest.param(msgspec.msgpack.encode({"type": "Explode"}), id="unknown type"),
        pytest.param(msgspec.msgpack.encode([1, 2]), id="not a map"),
        pytest.param(msgspec.msgpack.encode({"type": "AbortLeg", "handoff_id": 5}), id="wrong type"),
        pytest.param(b"\x91" * 100_000, id="deep nesting"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map of four billion"),
        pytest.param(b"\x82\xa4type\xa8AbortLeg\xaahandoff_id\xa2\xff\xfe", id="invalid UTF-8"),
    ],
)
def test_foreign_frames_are_refused(frame):
    for decoder in (codec.coordinator_messages, codec.worker_messages, codec.client_messages):
        with pytest.raises(ProtocolMismatch):
            decoder.decode(frame)


def test_a_frame_has_a_size_limit():
    with pytest.raises(ProtocolMismatch, match="the limit is 16777216"):
        codec.client_messages.decode(b"\x00" * (codec.MAX_MESSAGE_BYTES + 1))


def test_ten_thousand_mutated_frames_decode_or_are_refused():
    rng = random.Random(7)
    good = [
        codec.encode(SubmitRequest(protocol_version=1, request_id="r", prompt="hello",
                                   sampling=SamplingSpec(max_tokens=4, stop=["x"]))),
        *(bytes.fromhex(frame) for _, frame in GOLDEN),
    ]  # fmt: skip
    for _ in range(10_000):
        frame = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 6)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        for decoder in (codec.client_messages, codec.worker_messages):
            try:
                decoder.decode(bytes(frame[: rng.randint(0, len(frame))]))
            except ProtocolMismatch:
                continue


def test_token_ids_pack_to_four_bytes():
    assert pack_token_ids([1, 258]) == b"\x01\x00\x00\x00\x02\x01\x00\x00"
    assert unpack_token_ids(pack_token_ids(range(1000))) == list(range(1000))
    assert num_token_ids(pack_token_ids(range(1000))) == 1000
    with pytest.raises(OverflowError):
        pack_token_ids([-1])


@pytest.mark.parametrize("code", sorted(ERROR_TYPES))
def test_errors_survive_the_wire(code):
    report = ErrorReport(
        code=code, message="m", param="p", phase="prefilling", worker_id="w", retry_after_s=2.0
    )
    error = error_from_report(report)
    assert type(error) is ERROR_TYPES[code] and error.report() == report


def test_every_message_belongs_to_a_direction():
    """A message nobody can receive is a bug waiting for its sender."""
    directions = (messages.WorkerMessage, messages.CoordinatorMessage, messages.ClientMessage,
                  messages.ClientReply)  # fmt: skip
    listed = {kind for union in directions for kind in union.__args__}
    defined = set(messages.Message.__subclasses__())
    assert defined == listed
