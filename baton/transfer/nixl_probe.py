"""Does KV transfer work on this machine, and how fast? Two processes, one NIXL READ, no engine.

    python -m baton.transfer.nixl_probe [--mib 64]      prints one JSON line

The source registers a buffer with a known pattern and describes it on its standard output; the
reader starts the source, pulls the buffer a few times, compares every byte and reports. `baton
doctor` runs this as a child process, because a missing or broken transport can end a process
inside native code.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

BACKEND = "UCX"
MIB = 1 << 20
NUM_READS = 5
"""The first one pays for the connection; the median of the others is reported."""

READ_TIMEOUT_S = 30.0
SOURCE_NAME, READER_NAME = "probe-source", "probe-reader"

Buffer = npt.NDArray[np.uint32]


class ProbeFailed(Exception):
    """A sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    nixl_version: str
    backend: str
    num_bytes: int
    first_read_s: float
    median_read_s: float
    mb_per_s: float


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m baton.transfer.nixl_probe", description=__doc__)
    parser.add_argument("--mib", type=int, default=64, help="size of one read")
    parser.add_argument("--source", action="store_true", help="internal: be the process that is read from")
    arguments = parser.parse_args(argv)
    if arguments.source:
        serve_source(arguments.mib * MIB)
        return 0
    try:
        print(json.dumps(asdict(measure(arguments.mib * MIB))))
    except ProbeFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def serve_source(num_bytes: int) -> None:
    """Describe a registered buffer in one JSON line, then stay until standard input ends."""
    buffer = _pattern(num_bytes)
    agent = _agent(SOURCE_NAME)
    registered = agent.register_memory([(*_region(buffer), "")], "DRAM")
    description = {"address": buffer.ctypes.data, "metadata": agent.get_agent_metadata().hex()}
    print(json.dumps(description), flush=True)
    sys.stdin.read()
    agent.deregister_memory(registered)


def measure(num_bytes: int) -> ProbeReport:
    """Raises ProbeFailed."""
    command = [sys.executable, "-m", __spec__.name, "--source", "--mib", str(num_bytes // MIB)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as source:
        try:
            assert source.stdout is not None
            description = _description(source.stdout)
            read_s = _read_repeatedly(description, num_bytes)
        finally:
            source.kill()
    median_s = sorted(read_s[1:])[len(read_s[1:]) // 2]
    return ProbeReport(
        nixl_version=metadata.version("nixl"),
        backend=BACKEND,
        num_bytes=num_bytes,
        first_read_s=round(read_s[0], 6),
        median_read_s=round(median_s, 6),
        mb_per_s=round(num_bytes / median_s / 1e6, 1),
    )


def _description(lines: Any) -> dict[str, Any]:
    for line in lines:
        if re.match(r'\{"address"', line):  # NIXL and UCX may print lines of their own
            description: dict[str, Any] = json.loads(line)
            return description
    raise ProbeFailed("the source process ended before it had registered its buffer")


def _read_repeatedly(description: dict[str, Any], num_bytes: int) -> list[float]:
    expected = _pattern(num_bytes)
    buffer = np.zeros_like(expected)
    agent = _agent(READER_NAME)
    registered = agent.register_memory([(*_region(buffer), "")], "DRAM")
    source = agent.add_remote_agent(bytes.fromhex(description["metadata"]))
    local = agent.get_xfer_descs([_region(buffer)], "DRAM")
    remote = agent.get_xfer_descs([(description["address"], num_bytes, 0)], "DRAM")
    read_s = []
    for _ in range(NUM_READS):
        buffer[:] = 0
        read_s.append(_read_once(agent, local, remote, source))
        if not np.array_equal(buffer, expected):
            wrong = int(np.count_nonzero(buffer != expected)) * buffer.itemsize
            raise ProbeFailed(f"{wrong} of {num_bytes} bytes arrived wrong")
    agent.remove_remote_agent(source)
    agent.deregister_memory(registered)
    return read_s


def _read_once(agent: Any, local: Any, remote: Any, source: str) -> float:
    handle = agent.initialize_xfer("READ", local, remote, source)
    started_s = time.monotonic()
    state = agent.transfer(handle)
    while state == "PROC":
        if time.monotonic() - started_s > READ_TIMEOUT_S:
            raise ProbeFailed(f"a read was not over after {READ_TIMEOUT_S:.0f} s")
        state = agent.check_xfer_state(handle)
    took_s = time.monotonic() - started_s
    if state != "DONE":
        raise ProbeFailed(f"a read ended in state {state}")
    agent.release_xfer_handle(handle)
    return took_s


def _agent(name: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    try:
        return nixl_agent(name, nixl_agent_config(backends=[BACKEND]))
    except Exception as error:  # whatever the native layer throws, it is what this probe is to find
        raise ProbeFailed(f"no NIXL agent with the {BACKEND} backend: {error!r}") from error


def _region(buffer: Buffer) -> tuple[int, int, int]:
    return (buffer.ctypes.data, buffer.nbytes, 0)


def _pattern(num_bytes: int) -> Buffer:
    return (np.arange(num_bytes // 4, dtype=np.uint32) * np.uint32(2_654_435_761)).astype(np.uint32)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
