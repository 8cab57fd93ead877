"""What there is to place on: nodes of GPUs, and how fast KV moves inside and between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from baton.step_time import GpuSpec, gpu_by_name

MAX_GPUS = 1024


class ClusterError(ValueError):
    """A sentence: what is wrong with the description of the hardware."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePool:
    """Equal nodes."""

    gpu: GpuSpec
    node_sizes: tuple[int, ...]
    """GPUs of each node; the last one may be a part of a node."""

    @property
    def num_gpus(self) -> int:
        return sum(self.node_sizes)

    @property
    def largest_node(self) -> int:
        return max(self.node_sizes)

    def limited_to(self, num_gpus: int) -> NodePool:
        """Its first `num_gpus`."""
        sizes, left = [], num_gpus
        for size in self.node_sizes:
            if left > 0:
                sizes.append(min(size, left))
                left -= size
        return NodePool(gpu=self.gpu, node_sizes=tuple(sizes))

    def __str__(self) -> str:
        count, size = len(self.node_sizes), self.node_sizes[0]
        if len(set(self.node_sizes)) == 1:
            return f"{count}x{size} {self.gpu.name}"
        return f"{self.num_gpus} {self.gpu.name} on {count} nodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    prefill: NodePool
    decode: NodePool
    is_shared: bool
    """Both phases draw on one pool; otherwise each has its own GPUs."""
    node_network_bytes_per_s: float | None = None
    """One link per node and direction, shared by its GPUs; None: each GPU has its own NIC."""
    peer_bytes_per_s: float | None = None
    """Between two GPUs of a node; None: as the GPU's data sheet says."""

    @property
    def num_gpus(self) -> int:
        return self.prefill.num_gpus + (0 if self.is_shared else self.decode.num_gpus)

    def limited_to(self, num_gpus: int) -> Cluster:
        """A GPU budget. With separate pools it is a limit on the sum, which the search keeps."""
        if not self.is_shared or num_gpus >= self.num_gpus:
            return self
        pool = self.prefill.limited_to(num_gpus)
        return Cluster(
            prefill=pool, decode=pool, is_shared=True, peer_bytes_per_s=self.peer_bytes_per_s,
            node_network_bytes_per_s=self.node_network_bytes_per_s,
        )  # fmt: skip

    def __str__(self) -> str:
        return str(self.prefill) if self.is_shared else f"prefill {self.prefill}, decode {self.decode}"


def parse_cluster(
    text: str, *, network_gbit_per_s: float | None = None, peer_gbyte_per_s: float | None = None
) -> Cluster:
    """`4x8:h100`, `8:h100` (one node), or a YAML file; see docs/planning.md. Raises ClusterError."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    pool = _pool(text)
    return Cluster(
        prefill=pool, decode=pool, is_shared=True,
        node_network_bytes_per_s=_rate(network_gbit_per_s, "network", 0.125e9),
        peer_bytes_per_s=_rate(peer_gbyte_per_s, "nvlink", 1e9),
    )  # fmt: skip


def _rate(value: float | None, name: str, unit: float) -> float | None:
    if value is None:
        return None
    if not value > 0:
        raise ClusterError(f"--{name} is {value:g}, expected more than 0")
    return value * unit


def _pool(text: str) -> NodePool:
    match = re.fullmatch(r"(?:(\d+)x)?(\d+):([\w.-]+)", text.strip())
    if match is None:
        raise ClusterError(f"--gpus {text!r}: expected NODESxGPUS:NAME like 4x8:h100, or a .yaml file")
    return _checked_pool(int(match[1] or 1), int(match[2]), match[3])


def _checked_pool(nodes: int, gpus_per_node: int, name: str) -> NodePool:
    if nodes < 1 or gpus_per_node < 1:
        raise ClusterError(f"{nodes} nodes of {gpus_per_node} GPUs: both start at 1")
    if nodes * gpus_per_node > MAX_GPUS:
        raise ClusterError(f"{nodes * gpus_per_node} GPUs, the planner takes up to {MAX_GPUS}")
    try:
        gpu = gpu_by_name(name)
    except ValueError as error:
        raise ClusterError(str(error)) from None
    return NodePool(gpu=gpu, node_sizes=(gpus_per_node,) * nodes)


_POOL_KEYS = {"gpu", "nodes", "gpus_per_node"}
_LINK_KEYS = {"network_gbit_per_s", "nvlink_gbyte_per_s"}


def _from_yaml(path: Path) -> Cluster:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ClusterError(f"{path}: expected gpu, nodes and gpus_per_node, or prefill and decode with these")
    links = {key: _number(document.pop(key), path, key) for key in sorted(_LINK_KEYS & set(document))}
    rates = {
        "node_network_bytes_per_s": _rate(links.get("network_gbit_per_s"), "network", 0.125e9),
        "peer_bytes_per_s": _rate(links.get("nvlink_gbyte_per_s"), "nvlink", 1e9),
    }
    if set(document) == {"prefill", "decode"}:
        return Cluster(
            prefill=_yaml_pool(document["prefill"], path, "prefill"),
            decode=_yaml_pool(document["decode"], path, "decode"), is_shared=False, **rates,
        )  # fmt: skip
    pool = _yaml_pool(document, path, "the file")
    return Cluster(prefill=pool, decode=pool, is_shared=True, **rates)


def _yaml_pool(value: Any, path: Path, where: str) -> NodePool:
    if not isinstance(value, dict) or not {"gpu", "gpus_per_node"} <= set(value):
        raise ClusterError(f"{path}: {where} needs gpu and gpus_per_node, and may have nodes")
    if unknown := sorted(set(map(str, value)) - _POOL_KEYS):
        raise ClusterError(
            f"{path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_POOL_KEYS | _LINK_KEYS))}"
        )
    nodes, per_node = value.get("nodes", 1), value["gpus_per_node"]
    for name, number in (("nodes", nodes), ("gpus_per_node", per_node)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise ClusterError(f"{path}: {name} is {number!r}, expected a whole number")
    return _checked_pool(nodes, per_node, str(value["gpu"]))


def _number(value: Any, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClusterError(f"{path}: {key} is {value!r}, expected a number")
    return float(value)


@dataclass(frozen=True, slots=True)
class Split:
    """How one worker is spread: ranks that share each layer, and stages."""

    tensor: int
    pipeline: int

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"TP{self.tensor}" + (f" PP{self.pipeline}" if self.pipeline > 1 else "")


class Packing:
    """Fills nodes worker by worker. A tensor-parallel group never leaves its node; a worker that fits
    into one node goes into one."""

    def __init__(self, node_sizes: Sequence[int]) -> None:
        self.free = list(node_sizes)

    def place(self, split: Split, near: int | None = None) -> list[int] | None:
        """The node of each stage, or None when there is no room. `near` is preferred."""
        order = sorted(range(len(self.free)), key=lambda node: (node != near, self.free[node], node))
        for node in order:
            if self.free[node] >= split.num_gpus:
                self.free[node] -= split.num_gpus
                return [node] * split.pipeline
        if split.pipeline == 1:
            return None
        stages: list[int] = []
        free = list(self.free)
        for node in sorted(range(len(free)), key=lambda node: -free[node]):
            while free[node] >= split.tensor and len(stages) < split.pipeline:
                free[node] -= split.tensor
                stages.append(node)
        if len(stages) < split.pipeline:
            return None
        self.free = free
        return stages
