"""Workers as real processes: readiness, signals, exit codes, no orphans."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton.contract.messages import Heartbeat, LegFailed, PrefillFinished, RegisterWorker, WorkerLeaving
from baton.ports import free_port

ROOT = Path(__file__).parents[2]


class WorkerProcess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def line(self, words: str) -> str:
        """The first line from now on that holds `words`."""
        assert self.process.stdout is not None
        while line := (await self.process.stdout.readline()).decode():
            self.lines.append(line)
            if words in line:
                return line
        raise AssertionError(f"no line with {words!r}:\n" + "".join(self.lines))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def exit_code(self) -> int:
        assert self.process.stdout is not None
        self.lines += [line.decode() async for line in self.process.stdout]
        return await self.process.wait()


@asynccontextmanager
async def worker_process(
    role: str, *arguments: str, command: list[str] | None = None
) -> AsyncIterator[WorkerProcess]:
    process = await asyncio.create_subprocess_exec(
        *(command or [sys.executable, "-m", f"{role}_worker"]), *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        yield WorkerProcess(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def options(coordinator, *more: str) -> list[str]:
    return ["--engine", "simulated", "--coordinator", f"127.0.0.1:{coordinator.port}", *more]


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_starts_registers_and_leaves_cleanly(make_coordinator, role, number):
    coordinator = make_coordinator()
    arguments = options(coordinator, "--worker-id", "w7", "--log-level", "error")
    async with worker_process(role, *arguments) as worker:
        assert "worker_id=w7" in await worker.line("worker ready")
        registration = await coordinator.expect(RegisterWorker)
        assert (registration.role.value, registration.pid) == (role, worker.process.pid)
        worker.signal(number)
        await coordinator.expect(WorkerLeaving, 2)
        assert await worker.exit_code() == 0
    assert "  simulated-step-s: 0.0\n" in worker.lines  # resolved settings are printed


async def test_first_signal_waits_for_legs_and_second_does_not(make_coordinator, start_prefill):
    """
    1. a leg never ends; Ctrl-C: the worker says it is leaving and waits for the leg
    2. Ctrl-C again: it exits at once with 128 + SIGINT
    """
    coordinator = make_coordinator()
    arguments = options(coordinator, "--simulated-fault", "prefill:stall", "--drain-timeout-s", "1000")
    async with worker_process("prefill", *arguments) as worker:
        await worker.line("worker ready")
        coordinator.send(start_prefill("h1"))
        await worker.line("leg started handoff_id=h1 request_id=r-h1 num_prompt_tokens=3")
        worker.signal(signal.SIGINT)
        await worker.line("drain started")
        await coordinator.expect_heartbeat_now()
        worker.signal(signal.SIGINT)
        assert await worker.exit_code() == 128 + signal.SIGINT


async def test_drain_lets_a_leg_finish(make_coordinator, start_prefill):
    coordinator = make_coordinator()
    # One step of half a second: the leg is running when the signal comes.
    arguments = options(coordinator, "--simulated-step-s", "0.5", "--kv-lease-s", "1")
    async with worker_process("prefill", *arguments) as worker:
        await worker.line("worker ready")
        coordinator.send(start_prefill("h1"))
        await worker.line("leg started")
        worker.signal(signal.SIGTERM)
        finished = await coordinator.expect(PrefillFinished)
        assert finished.kv_source is not None
        assert await worker.exit_code() == 0


async def test_a_signal_while_waiting_for_the_coordinator_ends_it():
    address = f"127.0.0.1:{free_port()}"
    async with worker_process("decode", "--engine", "simulated", "--coordinator", address) as worker:
        await worker.line("waiting for coordinator")
        worker.signal(signal.SIGTERM)
        assert await worker.exit_code() == 0


async def test_engine_death_fails_legs_and_exits_1(make_coordinator, start_decode):
    coordinator = make_coordinator()
    async with worker_process("decode", *options(coordinator, "--simulated-fault", "accept:die")) as worker:
        await worker.line("worker ready")
        coordinator.send(start_decode("h1"))
        assert (await coordinator.expect(LegFailed)).error.code == "engine_failed"
        await coordinator.expect(WorkerLeaving, 2)
        assert await worker.exit_code() == 1


async def test_a_process_can_be_made_to_vanish(make_coordinator, start_decode):
    coordinator = make_coordinator()
    arguments = options(coordinator, "--simulated-fault", "accept:kill:nth=2")
    async with worker_process("decode", *arguments) as worker:
        await worker.line("worker ready")
        coordinator.send(start_decode("h1"))
        coordinator.send(start_decode("h2"))
        assert await worker.exit_code() == -signal.SIGKILL
        assert coordinator.of(WorkerLeaving) == coordinator.of(LegFailed) == []


async def test_one_process_can_be_several_simulated_workers(make_coordinator):
    coordinator = make_coordinator()
    arguments = options(coordinator, "--worker-id", "w", "--simulated-num-workers", "3")
    async with worker_process("decode", *arguments) as worker:
        await coordinator.expect(RegisterWorker, 3)
        registrations = coordinator.of(RegisterWorker)
        assert sorted(registration.worker_id for registration in registrations) == ["w-1", "w-2", "w-3"]
        assert len({registration.boot_id for registration in registrations}) == 3
        for _ in registrations:  # one that has not heard its acceptance has nobody to say farewell to
            await worker.line("worker ready")
        worker.signal(signal.SIGTERM)
        await coordinator.expect(WorkerLeaving, 6)
        assert await worker.exit_code() == 0


async def test_a_taken_transfer_port_stops_the_start(make_coordinator):
    coordinator = make_coordinator()
    port = str(coordinator.port)
    async with worker_process("prefill", *options(coordinator, "--transfer-port", port)) as worker:
        assert await worker.exit_code() == 1
    assert f"port {port} on 127.0.0.1 is taken" in worker.lines[-1]
    assert coordinator.received == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], "model is required", id="no model"),
        pytest.param(["--model", "m", "--coordinator", "h:x"], "not an address", id="bad address"),
        pytest.param(["--model", "m", "--block-size-tokens", "0"], "block_size_tokens is 0", id="bad number"),
        pytest.param(["--modell", "m"], "--modell", id="unknown flag"),
        pytest.param(
            ["--engine", "simulated", "--simulated-step-time", "linear:base=1"],
            "'base' is no part",
            id="step time",
        ),
        pytest.param(
            ["--engine", "simulated", "--simulated-step-time", "linear:base_s=1", "--simulated-step-s", "1"],
            "simulated_step_time excludes",
            id="two step times",
        ),
        pytest.param(
            ["--engine", "simulated", "--simulated-fault", "accept:explode"],
            "simulated_fault: 'accept:explode': at accept there are ignore, error, die, kill",
            id="fault",
        ),
        pytest.param(
            ["--model", "m", "--simulated-num-workers", "2"], "a process of its own", id="two engines"
        ),
    ],
)
async def test_bad_settings_stop_the_start_with_2(arguments, words):
    async with worker_process("decode", *arguments) as worker:
        assert await worker.exit_code() == 2
    assert words in worker.lines[-1]


async def test_a_worker_dies_with_its_parent_when_asked_to(make_coordinator):
    """The parent is killed with SIGKILL and cannot say anything."""
    coordinator = make_coordinator()
    start = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
    arguments = ["-m", "prefill_worker", *options(coordinator, "--exit-with-parent")]
    async with worker_process("", *arguments, command=[sys.executable, "-c", start]) as parent:
        await parent.line("worker ready")
        pid = (await coordinator.expect(RegisterWorker)).pid
        assert pid != parent.process.pid
        parent.signal(signal.SIGKILL)
        # Standard output ends when the last process that has it is gone: this would wait for ever.
        await parent.exit_code()


async def test_a_killed_worker_comes_back_under_its_id(make_coordinator):
    coordinator = make_coordinator()
    arguments = options(coordinator, "--worker-id", "w1")
    async with worker_process("decode", *arguments) as worker:
        await worker.line("worker ready")
        worker.signal(signal.SIGKILL)
        await worker.exit_code()
    async with worker_process("decode", *arguments) as worker:
        await worker.line("worker ready")
        first, second = coordinator.of(RegisterWorker)
        assert first.worker_id == second.worker_id
        assert first.boot_id != second.boot_id
        await coordinator.expect(Heartbeat)
        worker.signal(signal.SIGTERM)
        assert await worker.exit_code() == 0
