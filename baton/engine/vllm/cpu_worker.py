"""vLLM's CPU worker without two of its crashes and a stall. vLLM loads it by name in its processes.

* With eager execution and a given KV size vLLM 0.32 skips the CPU warm-up, and that warm-up is what
  allocates the tensors one pipeline stage receives from the one before: the first request would
  crash.
* While a prompt is computed in chunks, a token is sampled after each and thrown away. To take back the
  random numbers it used vLLM moves the offset of the request's generator, which CPU generators do not
  have: one seeded request with a long prompt would end the engine. Here their state is put back.
* The first request that wants logprobs has one comparison compiled with the machine's C++ compiler: two to
  three seconds in which nobody gets a token, or a crash where there is no compiler. It saves GPU memory; here
  it is called as it is written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.sample import sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class BatonCPUWorker(CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        sampler.batched_count_greater_than = _num_not_below
        if type(self.model_runner) is CPUModelRunner:
            # It has been built by name inside; this class adds methods only.
            self.model_runner.__class__ = RewindingModelRunner

    def determine_available_memory(self) -> int:
        if self.parallel_config.pipeline_parallel_size > 1:
            self.model_runner.profile_run()
        available_bytes: int = super().determine_available_memory()
        return available_bytes


def _num_not_below(logprobs: Tensor, of_token: Tensor) -> Tensor:
    """The rank of one token in each row."""
    return (logprobs >= of_token).sum(-1)


class RewindingModelRunner(CPUModelRunner):
    def _sample(self, *arguments: Any, **named_arguments: Any) -> Any:
        kept = {row: generator.get_state() for row, generator in self._generators_of_chunks().items()}
        output = super()._sample(*arguments, **named_arguments)
        for row, state in kept.items():
            self.input_batch.generators[row].set_state(state)
        return output

    def _bookkeeping_sync(self, *arguments: Any, **named_arguments: Any) -> Any:
        hidden = self._generators_of_chunks()
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return super()._bookkeeping_sync(*arguments, **named_arguments)
        finally:
            self.input_batch.generators.update(hidden)

    def _generators_of_chunks(self) -> dict[int, Any]:
        """By row, of requests whose prompt goes on after this step."""
        generators = self.input_batch.generators
        if not generators:
            return {}
        unfinished = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        return {int(row): generators[int(row)] for row in unfinished if int(row) in generators}
