"""How fast is NIXL WRITE alone, and memcpy? Same descriptors and memory as a streamed chunk, no engine.

    python -m benchmarks.bare_write --layers 8 --blocks 16 --block-kib 256 --pool-blocks 640

A child process registers a pool of KV blocks; this one writes blocks of its own into it, in the pieces that
a chunk of a prompt has: one per layer and block. Prints one JSON line with MB/s of both; with
`--on-demand` one for each line on its standard input, of a single write and copy.

The memory decides: the poster's kernel copies the bytes and looks up the destination's pages one by one.
Between small pools of 2 MiB pages, which NumPy asks for, that takes half the CPU time that it takes between
pools like an engine's. So these are allocated as vLLM allocates KV (`torch.zeros`), are as large as an
engine's, and each write takes the blocks that have not been used for longest.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import time
from collections import deque
from statistics import median
from typing import Any

import numpy as np
import torch

NUM_WRITES = 9


def main() -> int:
    parser = argparse.ArgumentParser(description="NIXL WRITE and memcpy, MB/s")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=16, help="per write")
    parser.add_argument("--block-kib", type=int, default=256)
    parser.add_argument("--pool-blocks", type=int, default=640, help="of each process")
    parser.add_argument("--on-demand", action="store_true")
    parser.add_argument("--target", action="store_true", help="internal: be the process that is written to")
    options = parser.parse_args()
    shape = (options.layers * options.pool_blocks, options.block_kib * 1024)
    if options.target:
        _serve(shape)
        return 0
    command = [sys.executable, "-m", "benchmarks.bare_write", "--target"]
    command += ["--layers", str(options.layers), "--block-kib", str(options.block_kib)]
    command += ["--pool-blocks", str(options.pool_blocks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as target:
        assert target.stdout is not None
        try:
            description = next(json.loads(line) for line in target.stdout if line.startswith('{"address"'))
            writer = _Writer(shape, options.layers, options.blocks, description)
            writer.measure()  # connects
            if options.on_demand:
                for _ in sys.stdin:
                    print(json.dumps(writer.measure()), flush=True)
            else:
                results = [writer.measure() for _ in range(NUM_WRITES)]
                print(json.dumps({key: median(result[key] for result in results) for key in results[0]}))
            writer.close()
        finally:
            target.kill()
    return 0


def _agent(name: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def _pool(shape: tuple[int, int]) -> Any:
    """As vLLM allocates KV on CPU; its zeros are written, so the pages exist."""
    return torch.zeros(shape, dtype=torch.uint8).numpy()


def _descriptors(agent: Any, address: int, shape: tuple[int, int]) -> Any:
    num_blocks, block_bytes = shape
    table = np.zeros((num_blocks, 3), dtype=np.int64)
    table[:, 0] = address + np.arange(num_blocks, dtype=np.int64) * block_bytes
    table[:, 1] = block_bytes
    return agent.get_xfer_descs(table, "DRAM")


def _serve(shape: tuple[int, int]) -> None:
    buffer = _pool(shape)
    agent = _agent("bare-target")
    registered = agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")
    print(
        json.dumps({"address": buffer.ctypes.data, "metadata": agent.get_agent_metadata().hex()}), flush=True
    )
    # Until the writer is gone, or kills us: connecting needs both sides to look.
    while not select.select([sys.stdin], [], [], 0.0005)[0]:
        agent.get_new_notifs()
    agent.deregister_memory(registered)


class _Writer:
    def __init__(
        self, shape: tuple[int, int], num_layers: int, num_blocks: int, description: dict[str, Any]
    ) -> None:
        self._num_layers, self._num_blocks = num_layers, num_blocks
        self._pool_blocks = shape[0] // num_layers
        self._line = deque(range(self._pool_blocks))
        self._buffer = _pool(shape)
        self._num_bytes = num_layers * num_blocks * shape[1]
        self._agent = agent = _agent("bare-writer")
        self._registered = agent.register_memory(
            [(self._buffer.ctypes.data, self._buffer.nbytes, 0, "")], "DRAM"
        )
        target = agent.add_remote_agent(bytes.fromhex(description["metadata"]))
        self._local = agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", _descriptors(agent, self._buffer.ctypes.data, shape)
        )
        self._remote = agent.prep_xfer_dlist(target, _descriptors(agent, description["address"], shape))

    def measure(self) -> dict[str, float]:
        """MB/s of one write and one copy."""
        agent = self._agent
        source, destination = self._next_blocks(), self._next_blocks()
        started_s = time.perf_counter()
        handle = agent.make_prepped_xfer(
            "WRITE", self._local, source, self._remote, destination, notif_msg=b"n"
        )
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        write_s = time.perf_counter() - started_s
        if state != "DONE":
            raise SystemExit(f"a bare write ended in state {state}")
        agent.release_xfer_handle(handle)
        source, destination = self._next_blocks(), self._next_blocks()
        started_s = time.perf_counter()
        for mine, copied in zip(source, destination, strict=True):
            self._buffer[copied] = self._buffer[mine]
        copy_s = time.perf_counter() - started_s
        return {
            "write_mb_per_s": self._num_bytes / write_s / 1e6,
            "memcpy_mb_per_s": self._num_bytes / copy_s / 1e6,
        }

    def close(self) -> None:
        self._agent.deregister_memory(self._registered)

    def _next_blocks(self) -> Any:
        """The blocks that were used longest ago, layer by layer."""
        blocks = [self._line.popleft() for _ in range(self._num_blocks)]
        self._line.extend(blocks)
        layers = np.arange(self._num_layers, dtype=np.int32)[:, None] * self._pool_blocks
        return (layers + np.asarray(blocks, dtype=np.int32)).ravel().astype(np.int32)


if __name__ == "__main__":
    raise SystemExit(main())
