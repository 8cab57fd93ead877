"""Which bytes of whose block: NIXL descriptor lists between a prefill rank and the decode ranks it serves.

One prepared list per side and peer, indexed by layer x blocks + block. With different tensor-parallel
sizes a rank holds more heads than its counterpart; a block lies as [heads, tokens, dim], so the heads
both have are one range inside each block, and a transfer is still one range per layer and block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.transfer.stream_wire import Hello


class LayoutsDiffer(Exception):
    """A sentence: why these two ranks cannot stream to each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMemory:
    """Where one rank's KV lies. One region per layer, blocks at a fixed stride."""

    tp_rank: int
    tp_size: int
    device_id: int
    num_blocks: int
    base_addresses: Sequence[int]
    block_bytes: Sequence[int]
    block_strides: Sequence[int]

    @classmethod
    def of_hello(cls, hello: Hello) -> KvMemory:
        return cls(
            tp_rank=hello.tp_rank,
            tp_size=hello.tp_size,
            device_id=hello.device_id,
            num_blocks=hello.num_blocks,
            base_addresses=hello.base_addresses,
            block_bytes=hello.block_bytes,
            block_strides=hello.block_strides,
        )

    def descriptors(self, offsets: Sequence[int], lengths: Sequence[int]) -> npt.NDArray[np.int64]:
        """(address, bytes, device) per layer and block: that part of each block."""
        blocks = np.arange(self.num_blocks, dtype=np.int64)
        parts = []
        for base, stride, offset, length in zip(
            self.base_addresses, self.block_strides, offsets, lengths, strict=True
        ):
            part = np.empty((self.num_blocks, 3), dtype=np.int64)
            part[:, 0] = base + blocks * stride + offset
            part[:, 1], part[:, 2] = length, self.device_id
            parts.append(part)
        return np.concatenate(parts)


def common_part(source: KvMemory, destination: KvMemory) -> tuple[list[int], list[int], list[int]]:
    """(offset in the source's block, offset in the destination's, bytes), each per layer.

    Raises LayoutsDiffer.
    """
    if len(source.base_addresses) != len(destination.base_addresses):
        raise LayoutsDiffer(
            f"{len(source.base_addresses)} layers here, {len(destination.base_addresses)} there"
        )
    larger, smaller = max(source.tp_size, destination.tp_size), min(source.tp_size, destination.tp_size)
    if larger % smaller:
        raise LayoutsDiffer(f"tensor-parallel sizes {source.tp_size} and {destination.tp_size} do not divide")
    # In units of what a rank of the larger group holds.
    source_units, destination_units = larger // source.tp_size, larger // destination.tp_size
    source_first = source.tp_rank * source_units
    destination_first = destination.tp_rank * destination_units
    first = max(source_first, destination_first)
    num_units = min(source_first + source_units, destination_first + destination_units) - first
    if num_units <= 0:
        raise LayoutsDiffer(f"ranks {source.tp_rank} and {destination.tp_rank} share no heads")
    source_offsets, destination_offsets, lengths = [], [], []
    for mine, theirs in zip(source.block_bytes, destination.block_bytes, strict=True):
        if mine * source.tp_size != theirs * destination.tp_size:
            raise LayoutsDiffer(
                f"a block has {mine} bytes on each of {source.tp_size} ranks here, "
                f"{theirs} on each of {destination.tp_size} there"
            )
        unit = mine // source_units
        source_offsets.append((first - source_first) * unit)
        destination_offsets.append((first - destination_first) * unit)
        lengths.append(num_units * unit)
    return source_offsets, destination_offsets, lengths


class StreamPeer:
    """A decode rank that this prefill rank can write to."""

    def __init__(self, agent: Any, memory_type: str, own: KvMemory, hello: Hello) -> None:
        """Takes tens of milliseconds for thousands of blocks. Raises LayoutsDiffer, or what NIXL raises."""
        self._agent = agent
        self.memory = KvMemory.of_hello(hello)
        self._own_num_blocks = own.num_blocks
        own_offsets, peer_offsets, lengths = common_part(own, self.memory)
        self.bytes_per_block = sum(lengths)
        self.name: str = agent.add_remote_agent(hello.agent_metadata)
        self._local = agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", agent.get_xfer_descs(own.descriptors(own_offsets, lengths), memory_type)
        )
        self._remote = agent.prep_xfer_dlist(
            self.name, agent.get_xfer_descs(self.memory.descriptors(peer_offsets, lengths), memory_type)
        )

    def prepare_write(
        self, layers: range, own_blocks: Sequence[int], peer_blocks: Sequence[int], notice: bytes
    ) -> Any:
        """A handle to post. `notice` arrives after the bytes."""
        return self._agent.make_prepped_xfer(
            "WRITE",
            self._local,
            _indices(layers, own_blocks, self._own_num_blocks),
            self._remote,
            _indices(layers, peer_blocks, self.memory.num_blocks),
            notif_msg=notice,
        )

    def close(self) -> None:
        """Only with nothing in flight."""
        self._agent.release_dlist_handle(self._local)
        self._agent.release_dlist_handle(self._remote)
        self._agent.remove_remote_agent(self.name)


def _indices(layers: range, blocks: Sequence[int], num_blocks: int) -> npt.NDArray[np.int32]:
    first = np.arange(layers.start, layers.stop, dtype=np.int32)[:, None] * np.int32(num_blocks)
    indices: npt.NDArray[np.int32] = (first + np.asarray(blocks, dtype=np.int32)[None, :]).ravel()
    return indices
