"""GPUs: what their data sheets promise, and which share of it serving kernels reach.

The shares were chosen once, by least relative error over aiconfigurator 0.12.0's measured tables
(NVIDIA, Apache-2.0; its vllm backend, 16 bit) for Llama-3.1-8B, Llama-3.1-70B and Qwen3-8B at TP 1 to 8, then
rounded. Qwen3-32B was kept out; the error bands are its errors. See docs/step-time.md.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    name: str
    aliases: tuple[str, ...]
    flops_per_s: float
    """Dense 16-bit tensor-core peak."""
    memory_bytes_per_s: float
    memory_bytes: int
    """What the driver reports, not the name's round number."""
    peer_bytes_per_s: float
    """To another GPU of the node, one direction: NVLink, or PCIe where there is none."""
    nic_bytes_per_s: float
    """To another node, one direction, this GPU's share."""
    matmul_efficiency: float
    """Share of the peak that large matrix products reach."""
    half_efficiency_tokens: int
    """A product over so many rows reaches half of that: efficiency is rows / (rows + this)."""
    weight_read_efficiency: float
    kv_read_efficiency: float
    attention_efficiency: float
    """Of prefill attention, counted on the causal half of the score matrix."""
    activation_efficiency: float
    """Share of the memory bandwidth that norms, residuals and activation functions reach."""
    all_reduce_latency_s: float
    """Of a small all-reduce over two ranks; each further rank adds 15 %."""
    all_reduce_efficiency: tuple[tuple[int, float], ...]
    """(ranks, share of `peer_bytes_per_s` a large all-reduce's bus bandwidth reaches); between them
    the entry of the next larger count holds, beyond them the last."""
    layer_launch_s: float
    """Gaps between kernels, per layer, CUDA graphs on."""
    prefill_layer_launch_s: float
    """On top of it in a step with prompt tokens, which no full CUDA graph covers."""
    step_launch_s: float
    """Per step: input preparation and sampling."""
    validated_tensor_parallel_sizes: tuple[int, ...]
    error_band: float
    """Nine of ten points of the held-out model lie within this relative error."""
    provenance: str

    def all_reduce_bytes_per_s(self, num_ranks: int) -> float:
        for ranks, share in self.all_reduce_efficiency:
            if num_ranks <= ranks:
                return share * self.peer_bytes_per_s
        return self.all_reduce_efficiency[-1][1] * self.peer_bytes_per_s


_FITTED = "; shares from aiconfigurator 0.12.0 ({}, vllm tables), Llama-3.1-8B/70B and Qwen3-8B"

GPUS: dict[str, GpuSpec] = {
    spec.name: spec
    for spec in (
        GpuSpec(
            name="a100-80g-sxm",
            aliases=("a100", "a100-80g", "a100_sxm"),
            flops_per_s=312e12,
            memory_bytes_per_s=2.039e12,
            memory_bytes=85_198_045_184,  # 81,251 MiB
            peer_bytes_per_s=300e9,
            nic_bytes_per_s=25e9,
            matmul_efficiency=0.90,
            half_efficiency_tokens=64,
            weight_read_efficiency=0.685,
            kv_read_efficiency=0.71,
            attention_efficiency=0.72,
            activation_efficiency=0.50,
            all_reduce_latency_s=10e-6,
            all_reduce_efficiency=((8, 0.47),),
            layer_launch_s=17e-6,
            prefill_layer_launch_s=38e-6,
            step_launch_s=0.37e-3,
            validated_tensor_parallel_sizes=(1, 2, 4, 8),
            error_band=0.10,
            provenance="NVIDIA A100 data sheet (80 GB SXM: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s in all; "
            "HDR 200 Gb/s per GPU as in DGX A100)" + _FITTED.format("a100_sxm"),
        ),
        GpuSpec(
            name="h100-sxm",
            aliases=("h100", "h100_sxm"),
            flops_per_s=989e12,
            memory_bytes_per_s=3.35e12,
            memory_bytes=85_520_809_984,  # 81,559 MiB
            peer_bytes_per_s=450e9,
            nic_bytes_per_s=50e9,
            matmul_efficiency=0.82,
            half_efficiency_tokens=48,
            weight_read_efficiency=0.83,
            kv_read_efficiency=0.88,
            attention_efficiency=0.62,
            activation_efficiency=0.55,
            all_reduce_latency_s=6e-6,
            all_reduce_efficiency=((8, 0.77),),
            layer_launch_s=18e-6,
            prefill_layer_launch_s=18e-6,
            step_launch_s=0.40e-3,
            validated_tensor_parallel_sizes=(1, 2, 4, 8),
            error_band=0.13,
            provenance="NVIDIA H100 data sheet (SXM: 989 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s in all; "
            "NDR 400 Gb/s per GPU as in DGX H100)" + _FITTED.format("h100_sxm"),
        ),
        GpuSpec(
            name="h200-sxm",
            aliases=("h200", "h200_sxm"),
            flops_per_s=989e12,
            memory_bytes_per_s=4.8e12,
            memory_bytes=150_754_820_096,  # 143,771 MiB
            peer_bytes_per_s=450e9,
            nic_bytes_per_s=50e9,
            matmul_efficiency=0.82,
            half_efficiency_tokens=48,
            weight_read_efficiency=0.81,
            kv_read_efficiency=0.88,
            attention_efficiency=0.56,
            activation_efficiency=0.55,
            all_reduce_latency_s=5e-6,
            all_reduce_efficiency=((8, 0.78),),
            layer_launch_s=25e-6,
            prefill_layer_launch_s=18e-6,
            step_launch_s=0.32e-3,
            validated_tensor_parallel_sizes=(1, 2, 4, 8),
            error_band=0.13,
            provenance="NVIDIA H200 data sheet (SXM: 989 TFLOP/s dense, 4.8 TB/s, NVLink 900 GB/s in all; "
            "NDR 400 Gb/s per GPU)" + _FITTED.format("h200_sxm"),
        ),
        GpuSpec(
            name="l40s",
            aliases=(),
            flops_per_s=362.05e12,
            memory_bytes_per_s=864e9,
            memory_bytes=48_305_799_168,  # 46,068 MiB
            peer_bytes_per_s=32e9,
            nic_bytes_per_s=12.5e9,
            matmul_efficiency=0.70,
            half_efficiency_tokens=48,
            weight_read_efficiency=0.79,
            kv_read_efficiency=0.78,
            attention_efficiency=0.31,
            activation_efficiency=0.70,
            all_reduce_latency_s=4e-6,
            all_reduce_efficiency=((2, 0.56), (4, 0.12), (8, 0.06)),
            layer_launch_s=25e-6,
            prefill_layer_launch_s=49e-6,
            step_launch_s=0.10e-3,
            validated_tensor_parallel_sizes=(1, 2, 4),
            error_band=0.13,
            provenance="NVIDIA L40S data sheet (362 TFLOP/s dense, 864 GB/s, PCIe 4.0 x16, no NVLink; "
            "network assumed 100 Gb/s)" + _FITTED.format("l40s"),
        ),
    )
}


def gpu_by_name(name: str) -> GpuSpec:
    """Upper and lower case make no difference; `h100` means the SXM module."""
    key = name.lower()
    for spec in GPUS.values():
        if key == spec.name or key in spec.aliases:
            return spec
    known = ", ".join(
        f"{spec.name} ({', '.join(spec.aliases)})" if spec.aliases else spec.name for spec in GPUS.values()
    )
    raise ValueError(f"no GPU {name!r} is known; known are {known}")
