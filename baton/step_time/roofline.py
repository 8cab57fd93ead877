"""The physical model: a step takes the larger of computing and reading in its matrix products, plus
attention, plus communication, plus the gaps between kernels. docs/step-time.md derives it.

Per layer and rank, with t rows (prompt tokens and decoding sequences together):

    matmul      max(2 P (t + t_half) / (TP F eta_c),  P bytes / (TP BW eta_w))
    attention   4 heads head_dim pairs / (TP F eta_a)  +  KV bytes of the context / (ranks BW eta_k)
    activations t * bytes moved / (BW eta_x)
    all-reduce  2 * (alpha(TP) + 2 (TP-1)/TP * t hidden bytes / B)
    launches    a constant, larger when there are prompt tokens

and once per step the LM head (a matmul over the rows that are sampled) and a constant.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NamedTuple

from baton.step_time.base import StepWork
from baton.step_time.gpus import GpuSpec, gpu_by_name
from baton.step_time.region import Region
from baton.step_time.shapes import ModelShape, UnsupportedShape

P2P_LATENCY_S = 10e-6
"""One activation hop between pipeline stages (aiconfigurator's system files)."""

ALL_REDUCE_LATENCY_PER_RANK = 0.15

LAYER_ACTIVATION_PASSES = 8
"""Reads and writes of a hidden-size row per layer outside the matrix products: two norms, two
residual additions, rotary embedding."""

GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Factors on the groups of terms, 1.0 as shipped. Calibration changes these and nothing else."""

    compute: float = 1.0
    weight_read: float = 1.0
    attention: float = 1.0
    kv_read: float = 1.0
    activations: float = 1.0
    all_reduce_latency: float = 1.0
    all_reduce_bytes: float = 1.0
    launches: float = 1.0

    def __post_init__(self) -> None:
        if (smallest := min(astuple(self))) < 0:
            raise ValueError(f"a scale is {smallest:g}, a step cannot get faster by more work")


class Parts(NamedTuple):
    """Seconds of one step by group, named as in `Scales`."""

    compute: float
    weight_read: float
    attention: float
    kv_read: float
    activations: float
    all_reduce_latency: float
    all_reduce_bytes: float
    launches: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineStepTime:
    """A step's seconds from precomputed coefficients; `roofline` makes it from a shape and a GPU.

    Layer terms are sums over all layers, on one rank. Monotone in every term of StepWork and linear
    in the context for a fixed batch.
    """

    compute_per_row_s: float
    half_efficiency_rows: float
    weight_read_s: float
    head_compute_per_row_s: float
    head_read_s: float
    per_pair_s: float
    per_context_token_s: float
    activations_per_row_s: float
    all_reduce_latency_s: float
    all_reduce_per_row_s: float
    layer_launch_s: float
    prefill_layer_launch_s: float
    step_launch_s: float
    hop_s: float
    """Between two pipeline stages, latency part."""
    hop_per_row_s: float
    num_stages: int
    largest_stage_share: float
    """Layers of the fullest stage over all layers."""
    last_stage_share: float
    """Layers of the stage that also holds the LM head."""
    region: Region

    def step_s(self, work: StepWork) -> float:
        rows = work.num_prefill_tokens + work.num_decodes
        if not rows:
            return 0.0
        hops = (self.num_stages - 1) * (self.hop_s + rows * self.hop_per_row_s)
        return self._layers_s(work, rows) + self._head_s(work) + self.step_launch_s + hops

    def cadence_s(self, work: StepWork) -> float:
        rows = work.num_prefill_tokens + work.num_decodes
        if not rows:
            return 0.0
        if self.num_stages == 1:
            return self.step_s(work)
        layers_s, hop_s = self._layers_s(work, rows), self.hop_s + rows * self.hop_per_row_s
        last_s = self.last_stage_share * layers_s + self._head_s(work)
        return max(self.largest_stage_share * layers_s, last_s) + self.step_launch_s + hop_s

    def parts(self, work: StepWork) -> Parts:
        """`step_s` taken apart, hops counted among the launches."""
        rows = work.num_prefill_tokens + work.num_decodes
        if not rows:
            return Parts(*[0.0] * len(Parts._fields))
        compute_s = self.compute_per_row_s * (rows + self.half_efficiency_rows)
        is_compute_bound = compute_s > self.weight_read_s
        head_compute_s = self.head_compute_per_row_s * _sampled_rows(work)
        is_head_compute_bound = head_compute_s > self.head_read_s
        hops_s = (self.num_stages - 1) * (self.hop_s + rows * self.hop_per_row_s)
        launches_s = self.layer_launch_s + self.step_launch_s + hops_s
        return Parts(
            compute=compute_s * is_compute_bound + head_compute_s * is_head_compute_bound,
            weight_read=self.weight_read_s * (not is_compute_bound)
            + self.head_read_s * (not is_head_compute_bound),
            attention=self.per_pair_s * work.num_prefill_pairs,
            kv_read=self.per_context_token_s * work.num_context_tokens,
            activations=self.activations_per_row_s * rows,
            all_reduce_latency=self.all_reduce_latency_s,
            all_reduce_bytes=self.all_reduce_per_row_s * rows,
            launches=launches_s + self.prefill_layer_launch_s * bool(work.num_prefill_tokens),
        )

    def _layers_s(self, work: StepWork, rows: int) -> float:
        compute_s = self.compute_per_row_s * (rows + self.half_efficiency_rows)
        seconds = (
            (compute_s if compute_s > self.weight_read_s else self.weight_read_s)
            + self.per_pair_s * work.num_prefill_pairs
            + self.per_context_token_s * work.num_context_tokens
            + (self.activations_per_row_s + self.all_reduce_per_row_s) * rows
            + self.all_reduce_latency_s
            + self.layer_launch_s
        )
        return seconds + self.prefill_layer_launch_s if work.num_prefill_tokens else seconds

    def _head_s(self, work: StepWork) -> float:
        compute_s = self.head_compute_per_row_s * _sampled_rows(work)
        return compute_s if compute_s > self.head_read_s else self.head_read_s


def _sampled_rows(work: StepWork) -> int:
    """Every decoding sequence, and one for the prompts: how many of them end in this step does not
    travel in StepWork, and reading the head's weights costs more than a few rows of it."""
    return work.num_decodes + (1 if work.num_prefill_tokens else 0)


def by_name(
    gpu: str, shape: ModelShape, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> RooflineStepTime:
    """Raises ValueError with a sentence for an unknown GPU or a split the model does not allow."""
    return roofline(gpu_by_name(gpu), shape, tensor_parallel_size, pipeline_parallel_size)


def roofline(
    gpu: GpuSpec,
    shape: ModelShape,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    *,
    scales: Scales | None = None,
) -> RooflineStepTime:
    """Stages lie in one node when all ranks fit into it, else on one node each, joined by the NICs."""
    tp, pp = tensor_parallel_size, pipeline_parallel_size
    shape.check_parallel(tp, pp)
    if tp > GPUS_PER_NODE:
        raise UnsupportedShape(f"TP {tp}: a tensor-parallel group stays in one node of {GPUS_PER_NODE} GPUs")
    if shape.dtype_bytes != 2:
        raise UnsupportedShape(
            f"{shape.name} has {8 * shape.dtype_bytes}-bit weights, {gpu.name} is described for 16 bit"
        )
    factor = scales if scales is not None else Scales()
    num_layers, hidden = shape.num_layers, shape.hidden_size
    flops_per_s = gpu.flops_per_s * gpu.matmul_efficiency
    weight_bytes_per_s = gpu.memory_bytes_per_s * gpu.weight_read_efficiency
    rank_parameters = num_layers * shape.layer_parameters / tp
    head_parameters = shape.vocab_size * hidden / tp
    attention_width = shape.num_heads * shape.head_dim
    inner_width = shape.num_ffn_matrices * shape.ffn_size + 3 * attention_width
    activation_bytes = num_layers * shape.dtype_bytes * (LAYER_ACTIVATION_PASSES * hidden + inner_width / tp)
    row_bytes = hidden * shape.dtype_bytes
    num_all_reduces = 2 * num_layers if tp > 1 else 0
    all_reduce_alpha_s = gpu.all_reduce_latency_s * (1 + ALL_REDUCE_LATENCY_PER_RANK * (tp - 2))
    bus_bytes = 2 * (tp - 1) / tp * row_bytes
    hop_bytes_per_s = gpu.peer_bytes_per_s if tp * pp <= GPUS_PER_NODE else gpu.nic_bytes_per_s
    fullest, last = -(-num_layers // pp), num_layers // pp
    return RooflineStepTime(
        compute_per_row_s=factor.compute * 2 * rank_parameters / flops_per_s,
        half_efficiency_rows=gpu.half_efficiency_tokens,
        weight_read_s=factor.weight_read * rank_parameters * shape.dtype_bytes / weight_bytes_per_s,
        head_compute_per_row_s=factor.compute * 2 * head_parameters / flops_per_s,
        head_read_s=factor.weight_read * head_parameters * shape.dtype_bytes / weight_bytes_per_s,
        per_pair_s=factor.attention
        * 4
        * num_layers
        * attention_width
        / (tp * gpu.flops_per_s * gpu.attention_efficiency),
        per_context_token_s=factor.kv_read
        * shape.kv_bytes_per_token_and_rank(tp)
        / (gpu.memory_bytes_per_s * gpu.kv_read_efficiency),
        activations_per_row_s=factor.activations
        * activation_bytes
        / (gpu.memory_bytes_per_s * gpu.activation_efficiency),
        all_reduce_latency_s=factor.all_reduce_latency * num_all_reduces * all_reduce_alpha_s,
        all_reduce_per_row_s=factor.all_reduce_bytes
        * num_all_reduces
        * bus_bytes
        / gpu.all_reduce_bytes_per_s(tp),
        layer_launch_s=factor.launches * num_layers * gpu.layer_launch_s,
        prefill_layer_launch_s=factor.launches * num_layers * gpu.prefill_layer_launch_s,
        step_launch_s=factor.launches * gpu.step_launch_s,
        hop_s=factor.launches * P2P_LATENCY_S,
        hop_per_row_s=factor.launches * row_bytes / hop_bytes_per_s,
        num_stages=pp,
        largest_stage_share=fullest / num_layers,
        last_stage_share=last / num_layers,
        region=_checked_region(gpu, tp, pp),
    )


def _checked_region(gpu: GpuSpec, tp: int, pp: int) -> Region:
    notes = []
    if tp not in gpu.validated_tensor_parallel_sizes:
        checked = ", ".join(map(str, gpu.validated_tensor_parallel_sizes))
        notes.append(f"TP {tp} on {gpu.name}: checked for TP {checked}")
    if pp > 1:
        notes.append(f"PP {pp}: no measured pipeline was compared with the model")
    return Region(
        min_prefill_tokens=128,
        max_prefill_tokens=16_000,
        max_decodes=256,
        max_context_tokens=8_192,
        notes=tuple(notes),
    )
