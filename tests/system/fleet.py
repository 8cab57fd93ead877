"""A whole fleet for tests: coordinator and workers as real processes. Imported, not collected.

Each process has a session of its own and dies with the tests; `stop` ends it by its recorded pid and
checks that none of its children is left.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from baton.history import what_is_held
from baton.launch import processes
from baton.launch.processes import RecordedProcess
from baton.ports import free_port

T = TypeVar("T")

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
"""Nobody's promise: a real engine and its interpreter take seconds to end, and a busy machine makes many of
them."""
ANSWER_TIMEOUT_S = 120.0
"""No request of these tests may take longer, whatever is done to the fleet."""

POLL_S = 0.02


def wait_for(what: str, look: Callable[[], T], timeout_s: float) -> T:
    """Polls until `look` returns something true and returns that."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(POLL_S)
    return found


def elapsed(seconds: float) -> Callable[[], bool]:
    """For waits in which the time itself is the condition, as with a lease."""
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_s


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


class Stream:
    """A streamed answer, event by event. Leave it early to be a client that disconnects."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.is_done = False

    def __iter__(self) -> Iterator[Any]:
        """Parsed `data:` events up to [DONE]."""
        while line := self._response.readline():
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                self.is_done = True
                return
            yield json.loads(line[6:])

    def close(self) -> None:
        self._response.close()
        self._connection.close()


STARTED: WeakValueDictionary[str, Fleet] = WeakValueDictionary()
"""By folder; for whoever tells what happened in them."""


@dataclass
class Fleet:
    """Starts nothing by itself. Settings are flags of the processes."""

    folder: Path
    engine: str = "vllm"
    model: Path | None = None
    http_port: int = field(default_factory=free_port)
    fleet_port: int = field(default_factory=free_port)
    client_port: int = field(default_factory=free_port)
    members: dict[str, RecordedProcess] = field(default_factory=dict)
    ended: list[RecordedProcess] = field(default_factory=list)

    # ── processes ────────────────────────────────────────────────────────────────────────────

    def start_coordinator(self, *arguments: str) -> RecordedProcess:
        ports = ("--http-port", self.http_port, "--fleet-port", self.fleet_port,
                 "--client-port", self.client_port)  # fmt: skip
        model = ["--tokenizer", "none"] if self.model is None else ["--model", str(self.model)]
        return self._start("coordinator", "coordinator", *map(str, ports), *model, *arguments)

    def start_worker(self, role: str, name: str, *arguments: str) -> RecordedProcess:
        flags = [
            "--coordinator",
            f"127.0.0.1:{self.fleet_port}",
            "--worker-id",
            name,
            "--engine",
            self.engine,
        ]
        if self.model is not None:
            flags += ["--model", str(self.model)]
        module = "baton.worker.both" if role == "both" else f"{role}_worker"
        return self._start(module, name, *flags, *arguments)

    def _start(self, module: str, name: str, *arguments: str) -> RecordedProcess:
        STARTED[str(self.folder)] = self
        command = [sys.executable, "-m", module, "--exit-with-parent", *arguments]
        number = len(self.ended)
        member = processes.start(command, self.folder / f"{name}-{number}.log")
        self.members[name] = member
        return member

    def kill(self, name: str) -> RecordedProcess:
        """SIGKILL to the worker's own process only: what becomes of its engine is its own business."""
        member = self.members.pop(name)
        os.kill(member.pid, signal.SIGKILL)
        self.ended.append(member)
        return member

    def pause(self, name: str) -> None:
        self._signal_all(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._signal_all(name, signal.SIGCONT)

    def _signal_all(self, name: str, number: signal.Signals) -> None:
        self.send_signal(self.members[name].members(), number)

    @staticmethod
    def send_signal(pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Ends everything, coordinator first, and fails if anything had to be killed or is left."""
        for name in self.members:
            self.resume(name)
        ordered = sorted(self.members.items(), key=lambda item: item[0] != "coordinator")
        stubborn = []
        for _, member in ordered:
            member.terminate()
        for name, member in ordered:
            if not processes.wait_for_exit([member], STOP_TIMEOUT_S):
                stubborn.append(name)
        everything = [*self.members.values(), *self.ended]
        is_clean = processes.wait_until_empty(everything, STOP_TIMEOUT_S / 2)
        left = {member.pid: member.members() for member in everything if member.members()}
        processes.stop(everything, 0.0)
        for member in everything:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(member.pid, os.WNOHANG)
        self.members.clear()
        self.ended.clear()
        assert not stubborn, f"{stubborn} did not stop when asked to"
        assert is_clean, f"left running: {left}"

    def log(self, name: str) -> str:
        return self.members[name].log_text()

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def client_address(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout_s)
        try:
            connection.request(method, path, body=_bytes(body))
            with connection.getresponse() as response:
                headers = {name.lower(): value for name, value in response.getheaders()}
                return Answer(response.status, headers, response.read())
        finally:
            connection.close()

    def complete(self, prompt: Any, **body: Any) -> Answer:
        return self.ask("POST", "/v1/completions", {"prompt": prompt, **body})

    def stream(self, path: str, body: Any, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Stream:
        """Returns with the head of the answer; the caller closes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout_s)
        try:
            connection.request("POST", path, body=_bytes({**body, "stream": True}))
            return Stream(connection, connection.getresponse())
        except BaseException:
            connection.close()
            raise

    # ── state ────────────────────────────────────────────────────────────────────────────────

    def is_ready(self) -> bool:
        try:
            return self.ask("GET", "/ready", timeout_s=5.0).status == 200
        except OSError:
            return False

    def wait_until_ready(self) -> None:
        def look() -> bool:
            for name, member in self.members.items():
                assert member.is_alive(), f"{name} ended:\n{member.log_tail()}"
            return self.is_ready() and set(self.members) - {"coordinator"} == self.serving()

        wait_for("a fleet that is ready", look, START_TIMEOUT_S)
        self.wait_until_idle()

    def snapshot(self) -> Any:
        return self.ask("GET", "/fleet").json

    def workers(self) -> dict[str, Any]:
        return {worker["worker_id"]: worker for worker in self.snapshot()["workers"]}

    def serving(self) -> set[str]:
        """The workers that get requests: those whose join test is over."""
        return {name for name, worker in self.workers().items() if not worker["is_on_trial"]}

    def what_is_held(self) -> list[str]:
        """Everything that is not as in a fleet that serves nobody; empty in one that does not."""
        return what_is_held(self.snapshot())

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Until no request, no promise and no KV block is left anywhere."""
        deadline_s = time.monotonic() + timeout_s
        while held := self.what_is_held():
            assert time.monotonic() < deadline_s, f"after {timeout_s:g} s still held: {', '.join(held)}"
            time.sleep(POLL_S)


def _bytes(body: Any) -> bytes | None:
    return body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
