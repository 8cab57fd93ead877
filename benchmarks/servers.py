"""Processes under test: started in a group of their own, waited for, stopped by recorded group.

Each also dies with the benchmark (parent-death signal), so that a killed run leaves nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType

from benchmarks.cpu_time import snapshot, tree_seconds
from benchmarks.layout import REPOSITORY, SCRATCH

STOP_GRACE_S = 15.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class NotReady(Exception):
    """A server ended, or did not answer in time. The message names it and shows its log's end."""


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(slots=True)
class Server(AbstractContextManager["Server"]):
    name: str
    argv: Sequence[object]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log_tail(self) -> str:
        path = SCRATCH / f"{self.name}.log"
        return path.read_text(encoding="utf-8", errors="replace")[-3000:] if path.exists() else ""

    def start(self) -> Server:
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with (SCRATCH / f"{self.name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.argv],
                env=os.environ | self.environment,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return self

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            self.check_alive()
            if time.monotonic() > deadline:
                raise NotReady(f"{self.name}: {what} not within {timeout_s:.0f} s:\n{self.log_tail}")
            time.sleep(0.05)

    def check_alive(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            raise NotReady(f"{self.name} ended with {self.process.returncode}:\n{self.log_tail}")

    def stop(self) -> None:
        """TERM to the group, KILL to what is left of it."""
        if self.process is None:
            return
        self._signal_group(signal.SIGTERM)
        try:
            self.process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        self._signal_group(signal.SIGKILL)
        self.process.wait()

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def cpu_seconds(servers: Sequence[Server]) -> float:
    return tree_seconds([server.pid for server in servers], snapshot())


def answers(url: str, containing: bytes = b"") -> Callable[[], bool]:
    """True once GET gives 200 and a body that holds `containing`."""

    def ask() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2.0) as reply:
                return bool(reply.status == 200) and containing in reply.read()
        except (urllib.error.URLError, OSError):
            return False

    return ask


def accepts(port: int) -> Callable[[], bool]:
    def connect() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            return False
        return True

    return connect


_handed_out: set[int] = set()


def free_port() -> int:
    """A port nobody listens on and that this run has not handed out yet."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _handed_out:
            _handed_out.add(port)
            return port
