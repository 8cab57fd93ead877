"""A coordinator and workers as processes, with engines real or simulated, for benches of the product
alone. Workers outlive their coordinator: they register with the next one on the same port, caches
warm, so that two policies can take turns before the same engines."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

from benchmarks.servers import Server, free_port

START_TIMEOUT_S = 240.0


class LiveFleet(AbstractContextManager["LiveFleet"]):
    def __init__(self, name: str) -> None:
        """`name` opens the names of its log files."""
        self._name = name
        self._http, self._fleet, self._client = (free_port() for _ in range(3))
        self._stack = ExitStack()
        self._coordinator: Server | None = None
        self.workers: dict[str, Server] = {}
        self._num_expected = 0

    @property
    def address(self) -> str:
        """Of the ZeroMQ door."""
        return f"127.0.0.1:{self._client}"

    @property
    def coordinator(self) -> Server:
        assert self._coordinator is not None
        return self._coordinator

    def start_coordinator(self, *flags: object, tokenizer: str = "none") -> Server:
        """Beside its flags it gets `--tokenizer none`: token ids in, token ids out."""
        assert self._coordinator is None
        self._coordinator = Server(
            f"{self._name}-coordinator",
            [
                sys.executable, "-m", "coordinator", "--tokenizer", tokenizer, "--log-level", "warning",
                "--http-port", self._http, "--fleet-port", self._fleet, "--client-port", self._client, *flags,
            ],
        ).start()  # fmt: skip
        return self._coordinator

    def stop_coordinator(self) -> None:
        if self._coordinator is not None:
            self._coordinator.stop()
            self._coordinator = None

    def start_worker(
        self, role: str, name: str, *flags: object, num_workers: int = 1, is_slow: bool = False
    ) -> Server:
        """`is_slow`: see `benchmarks.slow_worker`."""
        program = ["baton.worker.both" if role == "both" else f"{role}_worker"]
        if is_slow:
            program = ["benchmarks.slow_worker", role]
        argv: list[object] = [
            sys.executable, "-m", *program, "--coordinator", f"127.0.0.1:{self._fleet}",
            "--worker-id", name, "--log-level", "warning", *flags,
        ]  # fmt: skip
        if num_workers > 1:
            argv += ["--simulated-num-workers", num_workers]
        server = self._stack.enter_context(Server(f"{self._name}-{name}", argv))
        self.workers[name] = server
        self._num_expected += num_workers
        return server

    def wait_until_registered(self) -> None:
        """Until the coordinator knows all workers that were started."""
        self._wait("registered workers", lambda _: True)

    def wait_until_ready(self) -> None:
        """Until all of them get requests, too: their join tests need workers of both roles."""
        self._wait("workers that get requests", lambda worker: not worker["is_on_trial"])

    def _wait(self, what: str, counts: Callable[[dict[str, Any]], bool]) -> None:
        def look() -> bool:
            for server in self.workers.values():
                server.check_alive()
            return sum(map(counts, self.registered())) == self._num_expected

        self.coordinator.wait_until(look, START_TIMEOUT_S, f"{self._num_expected} {what}")

    def registered(self) -> list[dict[str, Any]]:
        """What the coordinator knows of its workers; none while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/fleet", timeout=2.0) as reply:
                workers: list[dict[str, Any]] = json.load(reply)["workers"]
                return workers
        except OSError:
            return []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_coordinator()
        self._stack.close()
