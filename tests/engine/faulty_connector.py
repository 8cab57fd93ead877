"""The streaming connector with faults on demand, by the hand-off's name. vLLM loads it in its engines.

`wrong-…`  the first write, or the read, takes its first block from a wrong place (the block before it)
`flip-…`   one bit of one block flips after it has arrived
`fail-…`   the second write fails
`slow-…`   a pause after each chunk of its prefill
`unlucky16-…`  every sixteenth transfer of all that are called so goes wrong (`faulty_agent`)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from baton.transfer import nixl_stream_writer
from baton.transfer.nixl_stream_connector import StreamingNixlConnector
from baton.transfer.nixl_stream_peers import StreamPeer
from baton.transfer.nixl_stream_worker import StreamWorker
from baton.transfer.stream_wire import BlocksWritten, decode
from tests.engine.faulty_agent import FaultyAgent

PAUSE_S = 0.15


class FaultyPeer(StreamPeer):
    def prepare_write(
        self, layers: range, own_blocks: Sequence[int], peer_blocks: Sequence[int], notice: bytes
    ) -> Any:
        message = decode(notice)
        assert isinstance(message, BlocksWritten)
        fault = message.handoff_id.partition("-")[0]
        if fault == "wrong" and message.seq == 0:
            own_blocks = [own_blocks[0] - 1, *own_blocks[1:]]
        if fault == "fail" and message.seq == 1:
            raise RuntimeError("planted failure")
        return super().prepare_write(layers, own_blocks, peer_blocks, notice)


class FaultyWorker(StreamWorker):
    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.nixl_wrapper: Any = FaultyAgent(self.nixl_wrapper)
        self._misled: set[str] = set()

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        if req_id.startswith("wrong-") and req_id not in self._misled:  # it may be called twice
            self._misled.add(req_id)
            first, *others = meta.remote.block_ids[0]
            meta.remote.block_ids = ([first - 1, *others],)
        super()._read_blocks_for_req(req_id, meta)

    def is_intact(self, req_id: str) -> bool:
        if req_id.startswith("flip-"):
            block = self._to_compare[req_id].block_ids[-1]
            layer = list(self.device_kv_caches.values())[1]
            layer[block].view(torch.int32).view(-1)[11] ^= 1 << 20
        return super().is_intact(req_id)


class RefusingWorker(StreamWorker):
    def _reason_not_to_stream(self, num_layers: int) -> str | None:
        return "a test says so"


class RefusingStreamingConnector(StreamingNixlConnector):
    """Of a model whose KV cannot be streamed."""

    worker_class = RefusingWorker


class FaultyStreamingConnector(StreamingNixlConnector):
    worker_class = FaultyWorker

    def __init__(self, *arguments: Any, **named_arguments: Any) -> None:
        setattr(nixl_stream_writer, "StreamPeer", FaultyPeer)  # noqa: B010
        super().__init__(*arguments, **named_arguments)

    def wait_for_save(self) -> None:
        super().wait_for_save()
        progress = self._get_connector_metadata().orders.progress.values()
        if any(entry.handoff_id.startswith("slow-") for entry in progress):
            time.sleep(PAUSE_S)
