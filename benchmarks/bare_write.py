"""How fast is NIXL WRITE alone, and memcpy? Same descriptors as a streamed chunk, no engine.

    python -m benchmarks.bare_write --layers 8 --blocks 16 --block-kib 256

A child process registers a buffer; this one writes its own into it, in the pieces that a chunk of a
prompt has: one per layer and block, blocks scattered. Prints one JSON line with MB/s of both.
"""

from __future__ import annotations

import argparse
import json
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
            print(json.dumps(_measure(shape, options.layers, options.blocks, description)))
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
    deadline_s = time.monotonic() + 120.0
    while time.monotonic() < deadline_s:  # until we are killed: connecting needs both sides to look
        agent.get_new_notifs()
        time.sleep(0.0005)
    agent.deregister_memory(registered)


def _measure(
    shape: tuple[int, int], num_layers: int, num_blocks: int, description: dict[str, Any]
) -> dict[str, float]:
    rng = np.random.default_rng(1)
    buffer = np.full(shape, 7, dtype=np.uint8)
    agent = _agent("bare-writer")
    registered = agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")
    target = agent.add_remote_agent(bytes.fromhex(description["metadata"]))
    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", _descriptors(agent, buffer.ctypes.data, shape))
    remote = agent.prep_xfer_dlist(target, _descriptors(agent, description["address"], shape))
    per_layer = num_blocks * POOL_CHUNKS
    write_s = []
    for _ in range(NUM_WRITES):
        indices = [
            np.concatenate(
                [layer * per_layer + rng.permutation(per_layer)[:num_blocks] for layer in range(num_layers)]
            ).astype(np.int32)
            for _ in range(2)
        ]
        handle = agent.make_prepped_xfer("WRITE", local, indices[0], remote, indices[1], notif_msg=b"n")
        started_s = time.perf_counter()
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        write_s.append(time.perf_counter() - started_s)
        if state != "DONE":
            raise SystemExit(f"a bare write ended in state {state}")
        agent.release_xfer_handle(handle)
    agent.deregister_memory(registered)
    num_bytes = num_layers * num_blocks * shape[1]
    copy_s = []
    flat = buffer.reshape(-1)
    out = np.zeros(num_bytes, dtype=np.uint8)
    for _ in range(NUM_WRITES):
        started_s = time.perf_counter()
        out[:] = flat[:num_bytes]
        copy_s.append(time.perf_counter() - started_s)
    return {
        "write_mb_per_s": num_bytes / median(write_s[1:]) / 1e6,
        "memcpy_mb_per_s": num_bytes / median(copy_s[1:]) / 1e6,
    }


if __name__ == "__main__":
    raise SystemExit(main())
