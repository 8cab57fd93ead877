"""The streaming connector with faults on demand, by the hand-off's name. vLLM loads it in its engines.

`wrong-…`  the first write takes its first block from a wrong place (the block after it)
`fail-…`   the second write fails
`slow-…`   a pause after each chunk of its prefill
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from baton.transfer import nixl_stream_writer
from baton.transfer.nixl_stream_connector import StreamingNixlConnector
from baton.transfer.nixl_stream_peers import StreamPeer
from baton.transfer.stream_wire import BlocksWritten, decode

PAUSE_S = 0.15


class FaultyPeer(StreamPeer):
    def prepare_write(
        self, layers: range, own_blocks: Sequence[int], peer_blocks: Sequence[int], notice: bytes
    ) -> Any:
        message = decode(notice)
        assert isinstance(message, BlocksWritten)
        fault = message.handoff_id.partition("-")[0]
        if fault == "wrong" and message.seq == 0:
            own_blocks = [own_blocks[1], *own_blocks[1:]]
        if fault == "fail" and message.seq == 1:
            raise RuntimeError("planted failure")
        return super().prepare_write(layers, own_blocks, peer_blocks, notice)


class FaultyStreamingConnector(StreamingNixlConnector):
    def __init__(self, *arguments: Any, **named_arguments: Any) -> None:
        setattr(nixl_stream_writer, "StreamPeer", FaultyPeer)  # noqa: B010
        super().__init__(*arguments, **named_arguments)

    def wait_for_save(self) -> None:
        super().wait_for_save()
        progress = self._get_connector_metadata().orders.progress.values()
        if any(entry.handoff_id.startswith("slow-") for entry in progress):
            time.sleep(PAUSE_S)
