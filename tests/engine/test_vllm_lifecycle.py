"""Start, stop and death of one real engine."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.contract.errors import EngineFailed
from baton.contract.lifecycle import WorkerRole
from baton.process_guard import ProcessIdentity
from tests.engine.pair import Recorder

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """A start that is cut short leaves vLLM's sockets to the garbage collector, which warns: here."""
    yield
    gc.collect()


# Starts an engine, prints "READY <port>", waits. Pids of its children are read from /proc.
OWNER = """
import asyncio, sys
from baton.contract.lifecycle import WorkerRole
from baton.engine.vllm.engine import VllmEngine
from baton.engine.vllm.settings import VllmEngineSettings

class Silent:
    def on_step(self, deltas): pass
    def on_kv_events(self, events): pass
    def on_prefill_finished(self, finished): pass
    def on_leg_failed(self, handoff_id, error): pass
    def on_engine_dead(self, reason): pass

async def main():
    engine = VllmEngine(VllmEngineSettings(
        model=sys.argv[1], role=WorkerRole.PREFILL, max_model_len=512, kv_cache_bytes=64 << 20,
        tensor_parallel_size=int(sys.argv[2]), num_threads_per_rank=1))
    description = await engine.start(Silent())
    print("READY", description.transfer_endpoint.rsplit(":", 1)[1], flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(main())
"""


def descendants(pid: int) -> list[ProcessIdentity]:
    """Living ones: a process that has ended and was not waited for is left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            child = ProcessIdentity.of(int(entry.name))
        except (OSError, ProcessLookupError):
            continue
        if int(stat[stat.rindex(")") + 2 :].split()[1]) == pid:
            found += [child, *descendants(child.pid)]
    return found


def wait_until_gone(processes: list[ProcessIdentity], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while alive := [process.pid for process in processes if process.is_alive()]:
        assert time.monotonic() < deadline_s, f"still there: {alive}"
        time.sleep(0.05)


def can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.mark.parametrize("tensor_parallel_size", [1, 2], ids=["one-rank", "two-ranks"])
def test_killed_owner_leaves_nothing_behind(
    demo_model: Path, tmp_path: Path, tensor_parallel_size: int
) -> None:
    """
    1. an engine is up: it has child processes and holds its side channel's port
    2. its owner is killed with SIGKILL: within seconds all are gone and the port is free
    """
    script = tmp_path / "own_engine.py"
    script.write_text(OWNER)
    owner = subprocess.Popen(
        [sys.executable, str(script), str(demo_model), str(tensor_parallel_size)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    children: list[ProcessIdentity] = []
    try:
        assert owner.stdout is not None
        with owner.stdout:
            line = next((line for line in owner.stdout if line.startswith("READY ")), "")
            assert line, "the engine did not start"
        port = int(line.split()[1])
        children = descendants(owner.pid)
        assert len(children) > tensor_parallel_size
        assert not can_listen(port)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        wait_until_gone(children, timeout_s=6.0)
        assert can_listen(port)
    finally:
        owner.kill()
        owner.wait()
        for child in children:
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)


def test_a_port_that_is_taken_is_an_error_at_once(demo_model: Path) -> None:
    from baton.engine.vllm.engine import VllmEngine
    from baton.engine.vllm.settings import VllmEngineSettings

    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            engine = VllmEngine(
                VllmEngineSettings(
                    model=str(demo_model), role=WorkerRole.PREFILL, side_channel_port=taken.getsockname()[1]
                )
            )
            with pytest.raises(EngineFailed, match="cannot listen on the transfer's side channel 127"):
                await engine.start(Recorder())

    asyncio.run(scenario())


def test_a_start_can_be_cancelled(demo_model: Path) -> None:
    """
    1. the engine is loading: a child process exists
    2. the start is cancelled: it ends soon and the child with it
    """
    from baton.engine.vllm.engine import VllmEngine
    from baton.engine.vllm.settings import VllmEngineSettings

    async def scenario() -> None:
        engine = VllmEngine(
            VllmEngineSettings(model=str(demo_model), role=WorkerRole.DECODE, max_model_len=512)
        )
        before = {process.pid for process in descendants(os.getpid())}
        start = asyncio.create_task(engine.start(Recorder()))
        children: list[ProcessIdentity] = []
        async with asyncio.timeout(60):
            while not children:
                await asyncio.sleep(0.05)
                children = [
                    process
                    for process in descendants(os.getpid())
                    if process.pid not in before and b"spawn_main" in _command_line(process.pid)
                ]
        start.cancel()
        started_s = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert time.monotonic() - started_s < 8
        wait_until_gone(children, timeout_s=3.0)

    asyncio.run(scenario())


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    from baton.engine.vllm.engine import VllmEngine
    from baton.engine.vllm.settings import VllmEngineSettings

    async def scenario() -> None:
        engine = VllmEngine(VllmEngineSettings(model=str(tmp_path / "none"), role=WorkerRole.DECODE))
        with pytest.raises(EngineFailed, match="engine did not start: "):
            await engine.start(Recorder())

    asyncio.run(scenario())


def test_death_of_the_engine_is_told_once_and_fails_its_legs(demo_model: Path) -> None:
    """
    1. a leg is being decoded; the engine's process is killed
    2. the leg fails, then the engine is reported dead; new legs fail; stop is quick
    """
    from baton.contract.messages import StartDecode
    from baton.contract.sampling import SamplingSpec
    from baton.contract.tokens import pack_token_ids
    from baton.engine.vllm.engine import VllmEngine
    from baton.engine.vllm.settings import VllmEngineSettings

    def leg(handoff_id: str) -> StartDecode:
        return StartDecode(
            handoff_id=handoff_id,
            request_id=handoff_id,
            prompt_token_ids=pack_token_ids([1, 2, 3]),
            sampling=SamplingSpec(max_tokens=400, ignore_eos=True),
            kv_source=None,
        )

    async def scenario() -> None:
        before = {process.pid for process in descendants(os.getpid())}
        listener = Recorder()
        engine = VllmEngine(
            VllmEngineSettings(
                model=str(demo_model), role=WorkerRole.DECODE, max_model_len=512, kv_cache_bytes=64 << 20
            )
        )
        await engine.start(listener)
        first = listener.expect("first")
        engine.start_decode(leg("first"))
        await listener.first_tokens("first")
        for process in descendants(os.getpid()):
            if process.pid not in before and _command_line(process.pid).startswith(b"VLLM::EngineCore"):
                os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            result = await first
        assert result.error is not None
        assert result.error.code == "engine_failed"
        async with asyncio.timeout(5):
            await listener.died.wait()
        second = listener.expect("second")
        engine.start_decode(leg("second"))
        assert (await second).error.code == "engine_failed"
        started_s = time.monotonic()
        await engine.stop()
        await engine.stop()
        assert time.monotonic() - started_s < 10

    asyncio.run(scenario())
