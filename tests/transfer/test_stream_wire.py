"""Messages of streams: golden bytes, and what is not one of them."""

from __future__ import annotations

import pytest

from baton.transfer.stream_wire import (
    PREFIX,
    BlocksWritten,
    CancelStream,
    FirstToken,
    RegisterStream,
    StreamFailed,
    StreamMessage,
    decode,
    encode,
)

MESSAGES: list[StreamMessage] = [
    BlocksWritten(handoff_id="h1", source="p", epoch=7, seq=3, total=4),
    StreamFailed(handoff_id="h1", source="p", epoch=7, reason="a write failed"),
    CancelStream(handoff_id="h1", destination="d", epoch=7),
    RegisterStream(
        handoff_id="h1",
        destination="d",
        epoch=7,
        num_destinations=1,
        num_skipped=2,
        block_ids=[5, 6],
        ttl_s=60.0,
        wants_first_token=True,
    ),
    FirstToken(handoff_id="h1", source="p", epoch=7, token_id=42),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire(message):
    assert decode(encode(message)) == message


def test_the_bytes_of_a_notice_that_rides_on_a_write():
    assert encode(MESSAGES[0]) == PREFIX + b"\x96\xadBlocksWritten\xa2h1\xa1p\x07\x03\x04"


def test_vllms_own_notices_are_not_ours():
    assert not any(notice.startswith(PREFIX) for notice in (b"cmpl-1-0-ab:1", b"HB:cmpl-1,cmpl-2"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"cmpl-1:1",
        PREFIX,
        PREFIX + b"\xc1",
        PREFIX + b"\x91\xa4Nope",
        PREFIX + b"\x92\xacCancelStream\x01",
    ],
)
def test_anything_else_is_one_kind_of_error(data: bytes):
    with pytest.raises(ValueError, match="stream message"):
        decode(data)
