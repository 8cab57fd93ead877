"""How many KV tokens fit beside the weights."""

from __future__ import annotations

from baton.step_time.gpus import GpuSpec
from baton.step_time.shapes import ModelShape

MEMORY_UTILIZATION = 0.9
"""vLLM's default `gpu_memory_utilization`."""

COLLECTIVE_BYTES = 400 << 20
"""NCCL's buffers with more than one rank: 342 to 392 MiB in aiconfigurator's system files."""

ACTIVATION_ROWS = 8_192
"""Rows of the largest step, vLLM's usual `max_num_batched_tokens` on such GPUs."""


def kv_tokens_that_fit(
    gpu: GpuSpec,
    shape: ModelShape,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    *,
    memory_utilization: float = MEMORY_UTILIZATION,
) -> int:
    """Of one worker, 0 when not even the weights fit. The fullest rank decides: it holds the largest
    share of layers and, on the first and last stage, an embedding."""
    tp, pp = tensor_parallel_size, pipeline_parallel_size
    shape.check_parallel(tp, pp)
    free_bytes = memory_utilization * gpu.memory_bytes - rank_bytes_without_kv(shape, tp, pp)
    return max(0, int(free_bytes // shape.kv_bytes_per_token_and_rank(tp, pp)))


def rank_bytes_without_kv(
    shape: ModelShape, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> float:
    """Weights, activations of the largest step and collective buffers of the fullest rank."""
    tp, pp = tensor_parallel_size, pipeline_parallel_size
    layers = -(-shape.num_layers // pp)
    embedding = shape.vocab_size * shape.hidden_size
    num_embeddings = 2 if pp == 1 and not shape.has_tied_embeddings else 1
    parameters = (layers * shape.layer_parameters + num_embeddings * embedding) / tp
    widest = shape.num_ffn_matrices * shape.ffn_size / tp
    activations = ACTIVATION_ROWS * (4 * shape.hidden_size + widest)
    collective = COLLECTIVE_BYTES if tp * pp > 1 else 0
    return (parameters + activations) * shape.dtype_bytes + collective
