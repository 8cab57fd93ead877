"""A worker as a process: event loop, signals, exit code.

first SIGTERM or Ctrl-C    finish what runs, then exit 0 (while starting: stop at once, exit 0)
second one                 exit now with 128 + signal; the engine's children end with us
engine dead, refused       exit 1, with the reason logged
bad setting                exit 2, before anything is started
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable

import uvloop

from baton.clock import SystemClock
from baton.contract.errors import EngineFailed
from baton.contract.lifecycle import WorkerRole
from baton.engine.base import Engine
from baton.ports import is_port_free
from baton.process_guard import ProcessIdentity, die_with
from baton.settings import resolved
from baton.telemetry import configure_logging, event
from baton.wire.endpoints import DEFAULT_FLEET_PORT, parse_address, tcp
from baton.worker.runtime import EndOfServing, WorkerIdentity, WorkerRuntime
from baton.worker.settings import WorkerSettings

logger = logging.getLogger("baton.worker")

EXIT_OK, EXIT_FAILURE = 0, 1


def run_worker(
    settings: WorkerSettings,
    role: WorkerRole,
    build_engine: Callable[[str], Engine],
    *,
    prefill_window_tokens: int | None = None,
) -> int:
    """Blocks until the worker has left; the exit code. `build_engine(worker_id)` for each worker."""
    if settings.exit_with_parent:
        die_with(ProcessIdentity.parent())
    configure_logging(role.value, settings.log_level)
    print(f"{role.value} worker settings\n{resolved(settings)}", flush=True)
    port = settings.transfer_port
    if port is not None and not is_port_free(settings.host, port):
        # Checked before the engine is built: vLLM would load a model first, and then wait for ever.
        event(logger, "start failed", level=logging.ERROR, reason=f"port {port} on {settings.host} is taken")
        return EXIT_FAILURE
    name = settings.worker_id or f"{role.value}-{secrets.token_hex(4)}"
    count = settings.simulated_num_workers
    identities = [
        WorkerIdentity(
            worker_id=name if count == 1 else f"{name}-{number}",
            boot_id=secrets.token_hex(8),
            role=role,
            host=settings.host,
            pid=os.getpid(),
        )
        for number in range(1, count + 1)
    ]
    address = tcp(*parse_address(settings.coordinator, DEFAULT_FLEET_PORT))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_live(settings, identities, address, build_engine, prefill_window_tokens))


async def _live(
    settings: WorkerSettings,
    identities: list[WorkerIdentity],
    address: str,
    build_engine: Callable[[str], Engine],
    prefill_window_tokens: int | None,
) -> int:
    """Several workers of one process know nothing of each other; the exit code is the worst one."""
    runtimes = [
        WorkerRuntime(
            build_engine(identity.worker_id),
            identity,
            address,
            SystemClock(),
            drain_timeout_s=settings.drain_timeout_s,
            prefill_window_tokens=prefill_window_tokens,
        )
        for identity in identities
    ]
    _install_signals(runtimes)
    return max(await asyncio.gather(*map(_live_one, runtimes)))


async def _live_one(runtime: WorkerRuntime) -> int:
    identity = runtime.identity
    event(logger, "worker starting", worker_id=identity.worker_id, boot_id=identity.boot_id, pid=identity.pid)
    try:
        if not await _start(runtime):
            return EXIT_OK
        end = await runtime.serve()
        if end is EndOfServing.DRAIN_ASKED:
            await runtime.drain()
        return EXIT_OK if runtime.end is EndOfServing.DRAIN_ASKED else EXIT_FAILURE
    except EngineFailed as error:
        event(logger, "start failed", level=logging.ERROR, reason=error.message)
        return EXIT_FAILURE
    except Exception:
        logger.exception("worker failed")
        return EXIT_FAILURE
    finally:
        await runtime.stop()


async def _start(runtime: WorkerRuntime) -> bool:
    """False: somebody asked us to leave before the engine was up."""
    starting = asyncio.create_task(runtime.start(), name="engine start")
    asked = asyncio.create_task(runtime.end_requested(), name="wait for a reason to leave")
    try:
        await asyncio.wait([starting, asked], return_when=asyncio.FIRST_COMPLETED)
    finally:
        asked.cancel()
        if not starting.done():
            starting.cancel()
        await asyncio.wait([starting, asked])
    if starting.cancelled():
        return False
    starting.result()
    return True


def _install_signals(runtimes: list[WorkerRuntime]) -> None:
    def on_signal(number: signal.Signals) -> None:
        undisturbed = [runtime for runtime in runtimes if runtime.end is None]
        for runtime in undisturbed:
            runtime.request_drain(f"{number.name} received")
        if undisturbed:
            return
        # An orderly exit was under way; whoever asks twice does not want to wait for it.
        sys.stdout.flush()
        os._exit(128 + number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
