"""vLLM's connector for streaming hand-offs: everything the leased pull connector does, and streams.

vLLM loads this module by name inside its engine processes (`kv_connector="StreamingNixlConnector"`).
Which way a request's KV goes is said per request: one whose parameters name a stream is written by the
prefill engine while it computes, all others are read by the decode engine as before. `docs/handoff.md`
has the design.
"""

from __future__ import annotations

from typing import Any

from baton.transfer.nixl_connector import LeasedNixlConnector
from baton.transfer.nixl_stream_scheduler import FirstTokens, StreamMetadata, StreamScheduler
from baton.transfer.nixl_stream_worker import StreamWorker

CONNECTOR_NAME = "StreamingNixlConnector"
CONNECTOR_MODULE = __name__


class StreamingNixlConnector(LeasedNixlConnector):
    scheduler_class = StreamScheduler
    worker_class = StreamWorker
    is_strict = True

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layer hooks are not called inside a full CUDA graph."""
        return extra_config.get("kv_stream_writes") == "layer"

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if isinstance(kv_connector_metadata, StreamMetadata):
            self._stream_worker.begin_step(kv_connector_metadata)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        if isinstance(metadata := self._connector_metadata, StreamMetadata):
            self._stream_worker.save_layer(metadata, layer_name)

    def wait_for_save(self) -> None:
        super().wait_for_save()
        if isinstance(metadata := self._connector_metadata, StreamMetadata):
            self._stream_worker.save_step(metadata)

    def build_connector_worker_meta(self) -> FirstTokens | None:
        return self._stream_worker.take_first_tokens()

    def take_first_tokens(self) -> dict[str, int]:
        """For vLLM's scheduler (`baton.engine.vllm.first_token`)."""
        assert isinstance(self.connector_scheduler, StreamScheduler)
        return self.connector_scheduler.take_first_tokens()

    @property
    def _stream_worker(self) -> StreamWorker:
        assert isinstance(self.connector_worker, StreamWorker)
        return self.connector_worker
