"""How long KV takes from a prefill to a decode worker."""

from __future__ import annotations

from dataclasses import dataclass

from baton.step_time.gpus import GpuSpec

NIXL_LATENCY_S = 1e-3
"""Reading the hand-off's descriptors, posting and being told of the end. Not from a data sheet: the order
of what NIXL reads take here beyond their bytes; `baton profile` measures it."""

LINK_EFFICIENCY = 0.85
"""Share of a link's rate that large one-sided reads reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLink:
    bytes_per_s: float
    """Of all parallel links between the two workers together."""
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s is {self.bytes_per_s:g}, expected more than 0")
        if self.latency_s < 0:
            raise ValueError(f"latency_s is {self.latency_s:g}, expected at least 0")

    def transfer_s(self, kv_bytes: float, num_concurrent: int = 1) -> float:
        """Of one transfer among `num_concurrent` that share the link fairly and last as long."""
        return self.latency_s + kv_bytes * num_concurrent / self.bytes_per_s


def kv_link(gpu: GpuSpec, *, is_same_node: bool, num_pairs: int = 1) -> KvLink:
    """`num_pairs`: ranks that move their part at the same time, each over its own link; the smaller
    side's number of ranks."""
    rate = gpu.peer_bytes_per_s if is_same_node else gpu.nic_bytes_per_s
    return KvLink(bytes_per_s=rate * LINK_EFFICIENCY * num_pairs, latency_s=NIXL_LATENCY_S)
