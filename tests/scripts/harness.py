"""What the script tests share: a running `baton serve`, and a checkout with its own run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.launch.processes import RecordedProcess
from baton.ports import free_port

REPOSITORY = Path(__file__).parent.parent.parent
START_TIMEOUT_S = 60.0


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not after {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


def free_ports() -> dict[str, int]:
    return {name: free_port() for name in ("http", "fleet", "client")}


def port_flags(ports: dict[str, int]) -> list[str]:
    return [part for name, port in ports.items() for part in (f"--{name}-port", str(port))]


def complete(http_port: int, **fields: Any) -> dict[str, Any]:
    body = {"model": "simulated", "prompt": [1, 2, 3], "max_tokens": 4, **fields}
    request = urllib.request.Request(
        f"http://127.0.0.1:{http_port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


class Serve:
    """A running `baton serve`, with simulated engines unless told otherwise."""

    def __init__(self, run_dir: Path, *flags: str, engine: str = "simulated") -> None:
        self.run_dir = run_dir
        self.ports = free_ports()
        self.output_path = run_dir.with_suffix(".out")
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "baton.cli", "serve", "--engine", engine,
                 "--run-dir", str(run_dir), *port_flags(self.ports), *flags],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.output_path.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> Serve:
        wait_until(
            lambda: "\nready: " in self.output or self.process.poll() is not None, "serve is ready", timeout_s
        )
        assert self.process.poll() is None, self.output
        return self

    def children(self) -> dict[str, RecordedProcess]:
        return {path.stem: RecordedProcess.load(path) for path in self.run_dir.glob("*.pid")}

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def exit_code(self, timeout_s: float = 60.0) -> int:
        return self.process.wait(timeout_s)


class Checkout:
    """The scripts over an empty run folder: links to this checkout, so nothing is installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("scripts", "requirements", "pyproject.toml", ".venv"):
            (root / name).symlink_to(REPOSITORY / name)

    def run(self, script: str, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "scripts" / script), *arguments],
            capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def records(self) -> dict[str, RecordedProcess]:
        return {path.stem: RecordedProcess.load(path) for path in self.root.glob(".run/*/*.pid")}
