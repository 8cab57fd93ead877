"""Fleets started from a fleet file on free ports, for benchmarks that speak to them as clients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from baton.fleet_file import ROLES, FleetFile
from benchmarks.servers import Server, accepts, answers, free_port

COORDINATOR_TIMEOUT_S = 60.0
WORKERS_TIMEOUT_S = 240.0
"""Real engines import vLLM first: half a minute each, more on a busy machine."""

MODULES = {"prefill": "prefill_worker", "decode": "decode_worker", "both": "baton.worker.both"}


@contextmanager
def fleet(file: FleetFile, name: str, folder: Path) -> Iterator[str]:
    """Yields host:port of the ZeroMQ door once all workers have registered. Raises NotReady."""
    http, workers, client = (free_port() for _ in range(3))
    folder.mkdir(parents=True, exist_ok=True)

    def config(role: str) -> str:
        path = folder / f"{name}-{role}.yaml"
        path.write_text(yaml.safe_dump(file.settings.get(role, {})), encoding="utf-8")
        return str(path)

    with ExitStack() as stack:
        coordinator = Server(
            f"{name}-coordinator",
            [
                sys.executable, "-m", "coordinator", "--config", config("coordinator"), "--http-port", http,
                "--fleet-port", workers, "--client-port", client, "--log-level", "warning",
            ],
        )  # fmt: skip
        stack.enter_context(coordinator).wait_until(
            accepts(workers), COORDINATOR_TIMEOUT_S, "no fleet socket"
        )
        count = 0
        for role in ROLES:
            for number in range(file.num_workers(role)):
                worker = Server(
                    f"{name}-{role}-{number}",
                    [
                        sys.executable, "-m", MODULES[role], "--config", config(role),
                        "--coordinator", f"127.0.0.1:{workers}", "--worker-id", f"{role}-{number}",
                        "--log-level", "warning",
                    ],
                )  # fmt: skip
                stack.enter_context(worker)
                count += 1
                # One after the other: engines that start together share the cores and take longer.
                listed = answers(f"http://127.0.0.1:{http}/fleet", containing=f'"{role}-{number}"'.encode())
                worker.wait_until(listed, WORKERS_TIMEOUT_S, "not in GET /fleet")
        coordinator.wait_until(answers(f"http://127.0.0.1:{http}/ready"), COORDINATOR_TIMEOUT_S, "GET /ready")
        yield f"127.0.0.1:{client}"
