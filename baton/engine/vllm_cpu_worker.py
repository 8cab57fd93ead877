"""vLLM's CPU worker with what pipeline parallelism needs. vLLM loads it by name in its processes.

With eager execution and a given KV size vLLM 0.32 skips the CPU warm-up, and that warm-up is what
allocates the tensors one pipeline stage receives from the one before: the first request would crash.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class PipelineCPUWorker(CPUWorker):
    def determine_available_memory(self) -> int:
        self.model_runner.profile_run()
        available_bytes: int = super().determine_available_memory()
        return available_bytes
