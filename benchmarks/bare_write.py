"""How fast is NIXL WRITE alone, and memcpy? Same descriptors as a streamed chunk, no engine.

    python -m benchmarks.bare_write --layers 8 --blocks 16 --block-kib 256

A child process registers a buffer; this one writes its own into it, in the pieces that a chunk of a
prompt has: one per layer and block, blocks scattered. Prints one JSON line with MB/s of both; with
`--on-demand` one for each line on its standard input, of a single write and copy.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np

NUM_WRITES = 9
POOL_CHUNKS = 4
"""The pool is that many times what one write covers, as a KV pool is larger than a prompt."""


def main() -> int:
    parser = argparse.ArgumentParser(description="NIXL WRITE and memcpy, MB/s")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=16, help="per write")
    parser.add_argument("--block-kib", type=int, default=256)
    parser.add_argument("--on-demand", action="store_true")
    parser.add_argument("--target", action="store_true", help="internal: be the process that is written to")
    options = parser.parse_args()
    shape = (options.layers * options.blocks * POOL_CHUNKS, options.block_kib * 1024)
    if options.target:
        _serve(shape)
        return 0
    command = [sys.executable, "-m", "benchmarks.bare_write", "--target"]
    command += ["--layers", str(options.layers), "--blocks", str(options.blocks)]
    command += ["--block-kib", str(options.block_kib)]
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


def _descriptors(agent: Any, address: int, shape: tuple[int, int]) -> Any:
    num_blocks, block_bytes = shape
    table = np.zeros((num_blocks, 3), dtype=np.int64)
    table[:, 0] = address + np.arange(num_blocks, dtype=np.int64) * block_bytes
    table[:, 1] = block_bytes
    return agent.get_xfer_descs(table, "DRAM")


def _serve(shape: tuple[int, int]) -> None:
    buffer = np.zeros(shape, dtype=np.uint8)
    buffer[:] = 1  # the pages exist
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
        self._rng = np.random.default_rng(1)
        self._buffer = np.full(shape, 7, dtype=np.uint8)
        self._num_bytes = num_layers * num_blocks * shape[1]
        self._copied = np.zeros(self._num_bytes, dtype=np.uint8)
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
        handle = agent.make_prepped_xfer(
            "WRITE", self._local, self._indices(), self._remote, self._indices(), notif_msg=b"n"
        )
        started_s = time.perf_counter()
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        write_s = time.perf_counter() - started_s
        if state != "DONE":
            raise SystemExit(f"a bare write ended in state {state}")
        agent.release_xfer_handle(handle)
        started_s = time.perf_counter()
        self._copied[:] = self._buffer.reshape(-1)[: self._num_bytes]
        copy_s = time.perf_counter() - started_s
        return {
            "write_mb_per_s": self._num_bytes / write_s / 1e6,
            "memcpy_mb_per_s": self._num_bytes / copy_s / 1e6,
        }

    def close(self) -> None:
        self._agent.deregister_memory(self._registered)

    def _indices(self) -> Any:
        """Of blocks anywhere in the pool, layer by layer."""
        per_layer = self._num_blocks * POOL_CHUNKS
        layers = range(self._num_layers)
        scattered = [self._rng.permutation(per_layer)[: self._num_blocks] for _ in layers]
        return np.concatenate([layer * per_layer + scattered[layer] for layer in layers]).astype(np.int32)


if __name__ == "__main__":
    raise SystemExit(main())
