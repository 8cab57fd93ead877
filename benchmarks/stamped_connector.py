"""The streaming connector with a clock in it. vLLM loads it in the engines of `bench handoff`.

Writes JSON lines to the file named in `stamp_file` of its extra config, times of the machine's
monotonic clock, which all processes share: `forward` when the model has run a step of a prompt and
nothing has been posted for it yet, `write` for each write that was copied at once, `arrived` when the
decode engine reports that all KV of a request is here. The first and the last exist in every mode, so
every mode is judged between the same two events.
"""

from __future__ import annotations

import json
import time
from typing import Any, TextIO

from baton.transfer.nixl_stream_connector import StreamingNixlConnector
from baton.transfer.nixl_stream_worker import StreamWorker


class StampedWorker(StreamWorker):
    stamp_file: TextIO | None = None

    def _on_write(self, num_layer_blocks: int, took_s: float) -> None:
        if self.stamp_file is not None:
            self.stamp_file.write(
                json.dumps({"what": "write", "num_layer_blocks": num_layer_blocks, "took_s": took_s}) + "\n"
            )


class StampedConnector(StreamingNixlConnector):
    worker_class = StampedWorker

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        path = vllm_config.kv_transfer_config.kv_connector_extra_config["stamp_file"]
        self._file: TextIO = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - as long as we live
        if isinstance(self.connector_worker, StampedWorker):
            self.connector_worker.stamp_file = self._file

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        metadata = super().build_connector_meta(scheduler_output)
        metadata.stepped = list(scheduler_output.num_scheduled_tokens)
        return metadata

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """vLLM calls this right after the forward pass, before anything is posted."""
        now_s = time.monotonic()
        for req_id in getattr(self._connector_metadata, "stepped", ()):
            self._stamp("forward", req_id, now_s)
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        now_s = time.monotonic()
        for req_id in results.finished_recving:
            self._stamp("failed" if req_id in results.failed_recving else "arrived", req_id, now_s)
        return results

    def _stamp(self, what: str, req_id: str, now_s: float) -> None:
        self._file.write(json.dumps({"what": what, "req_id": req_id, "at_s": now_s}) + "\n")
