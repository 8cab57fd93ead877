"""`baton serve`: a coordinator and its workers on this machine, checked, in the foreground.

starting   the demo model if no other is asked for; all processes at once, since an engine takes
           longest; then `/ready`, then one self-test request whose KV bytes are counted
serving    until a child dies (that ends everything, exit 1) or Ctrl-C / SIGTERM
stopping   the coordinator first: it refuses new requests and lets accepted ones finish, for which
           it needs the workers. Then the workers, which have nothing left to do by then. Whatever
           is alive after that is killed, engines included. A second Ctrl-C goes there directly.

Children also watch this process and die with it, so killing the launcher leaves nothing behind.
Exit codes: 0 stopped as asked, 1 something failed, 2 usage or settings, 130 second Ctrl-C.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from baton.launch import processes
from baton.launch.plan import (
    PlannedProcess,
    Ports,
    PortTaken,
    ServeSettings,
    choose_ports,
    plan_coordinator,
    plan_workers,
    reachable_host,
)
from baton.launch.processes import RecordedProcess
from baton.launch.self_test import FleetHttp, SelfTestFailed, run_self_test
from baton.settings import load, resolved

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130

WORKER_READY = " worker ready "
COORDINATOR_READY = " coordinator ready "

LOOK_INTERVAL_S = 0.25
"""Between two looks at logs and `/ready` while starting."""

PROGRESS_INTERVAL_S = 5.0
COORDINATOR_GRACE_S = 5.0
"""On top of the drain timeout."""

WORKERS_STOP_S = 15.0
"""For workers without requests: vLLM needs up to five seconds to shut an engine down."""

MAX_PROGRESS_CHARS = 100
LOG_LINE = re.compile(r"(?:INFO|WARNING|ERROR| info| warning| error) (?:\d\S+ \d\S+ )?(.*)")
"""Of our processes and of vLLM; what stands before is time and process, which the launcher shows too."""


class StartFailed(Exception):
    """A sentence, with the end of a log where that helps."""


class StopRequested(Exception):
    """The first Ctrl-C or SIGTERM, raised wherever the launcher is."""


def main(argv: list[str]) -> int:
    settings = load(
        ServeSettings, argv, prog="baton serve",
        description="Runs a coordinator, prefill and decode workers on this machine.",
    )  # fmt: skip
    print(f"baton serve settings\n{resolved(settings)}", flush=True)
    launcher = Launcher(settings)
    launcher.install_signals()
    return launcher.run()


class Launcher:
    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._run_dir = Path(settings.run_dir)
        self._coordinator: RecordedProcess | None = None
        self._children: dict[str, RecordedProcess] = {}
        self._started_s = time.monotonic()
        self._is_stop_requested = False
        self._is_raising = True
        self._wake_read, self._wake_write = os.pipe()

    # ── signals ──────────────────────────────────────────────────────────────────────────────

    def install_signals(self) -> None:
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_stop_requested:
            for child in self._children.values():
                child.kill()
            os.write(2, b"stopped at once\n")
            os._exit(EXIT_INTERRUPTED)
        self._is_stop_requested = True
        if self._is_raising:
            raise StopRequested

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """A child must not be forgotten because the signal came between its start and its record."""
        self._is_raising = False
        try:
            yield
        finally:
            self._is_raising = True
        if self._is_stop_requested:
            raise StopRequested

    # ── the three stages ─────────────────────────────────────────────────────────────────────

    def run(self) -> int:
        try:
            self._start()
            self._serve()
            code = EXIT_OK
        except StopRequested:
            code = EXIT_OK
        except (StartFailed, PortTaken, SelfTestFailed, OSError) as error:
            print(f"baton serve: {error}", file=sys.stderr, flush=True)
            code = EXIT_FAILED
        finally:
            self._is_raising = False
            is_clean = self._stop()
        return code if is_clean else EXIT_FAILED

    def _start(self) -> None:
        settings = self._settings
        self._check_run_dir()
        ports = choose_ports(settings)
        model = self._model()
        planned = [plan_coordinator(settings, ports, model), *plan_workers(settings, ports, model)]
        for plan in planned:
            self._start_child(plan)
        http = FleetHttp(_url(reachable_host(settings.host), ports.http), self._api_key())
        self._wait_until_ready(http)
        if settings.self_test:
            self._say("self-test: one request through the HTTP door")
            self._say(f"self-test passed: {run_self_test(http).sentence()}")
        self._print_usage(ports, http)

    def _serve(self) -> None:
        while True:
            dead = processes.wait_for_any_exit(self._children.values(), 3600.0, self._wake_read)
            if dead is not None:
                raise self._death(dead)

    def _stop(self) -> bool:
        """False: something could not be stopped."""
        everything = list(self._children.values())
        if not everything:
            return True
        # From here on the first Ctrl-C of a failed start means: at once.
        self._is_stop_requested = True
        drain_s = self._settings.drain_timeout_s
        self._say(
            f"stopping: requests in flight may finish within {drain_s:.0f} s; Ctrl-C again stops at once"
        )
        if self._coordinator is not None:
            self._coordinator.terminate()
            processes.wait_for_exit([self._coordinator], drain_s + COORDINATOR_GRACE_S)
        is_clean = processes.stop(everything, WORKERS_STOP_S)
        for name, child in self._children.items():
            left = child.members()
            if left:
                self._say(f"{name}: still running after SIGKILL: {left}")
            else:
                self._record(name).unlink(missing_ok=True)
        self._say("stopped, nothing is left running" if is_clean else "could not stop everything")
        return is_clean

    # ── starting ─────────────────────────────────────────────────────────────────────────────

    def _check_run_dir(self) -> None:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        for record in self._run_dir.glob("*.pid"):
            try:
                members = RecordedProcess.load(record).members()
            except ValueError as error:
                raise StartFailed(f"{error}; remove it if you know that nothing of it runs") from error
            if members:
                raise StartFailed(
                    f"{record.stem} of {self._run_dir} is still running (pids {members}): stop it, or give "
                    f"this one another --run-dir"
                )
            record.unlink()

    def _model(self) -> str | None:
        settings = self._settings
        if settings.model is not None or settings.engine == "simulated":
            return settings.model
        from baton.demo_model import build_demo_model, is_complete

        path = Path(settings.demo_model).absolute()
        if not is_complete(path):
            self._say(f"making the demo model in {path}")
            build_demo_model(path)
        return str(path)

    def _api_key(self) -> str | None:
        """The self-test must show the key the coordinator was given; the coordinator checks the file."""
        if self._settings.coordinator_config is None:
            return None
        document = yaml.safe_load(Path(self._settings.coordinator_config).read_text(encoding="utf-8")) or {}
        return document.get("api_key") if isinstance(document, dict) else None

    def _start_child(self, plan: PlannedProcess) -> None:
        log = self._run_dir / "logs" / f"{plan.name}.log"
        shown = " ".join([*(f"{key}={value}" for key, value in plan.env.items()), shlex.join(plan.command)])
        self._say(f"starting {plan.name}, log {log}\n        + {shown}")
        with self._uninterrupted():
            child = processes.start(plan.command, log, plan.env)
            self._children[plan.name] = child
            if plan.name == "coordinator":
                self._coordinator = child
            child.save(self._record(plan.name))

    def _record(self, name: str) -> Path:
        return self._run_dir / f"{name}.pid"

    def _wait_until_ready(self, http: FleetHttp) -> None:
        deadline_s = time.monotonic() + self._settings.start_timeout_s
        next_progress_s = time.monotonic() + PROGRESS_INTERVAL_S
        loading = dict(self._children)
        while loading or not http.is_ready():
            for name, child in list(loading.items()):
                if (COORDINATOR_READY if child is self._coordinator else WORKER_READY) in child.log_text():
                    self._say(f"{name} ready")
                    del loading[name]
            now_s = time.monotonic()
            if now_s > deadline_s:
                waited_s = self._settings.start_timeout_s
                names = ", ".join(loading) or "join tests, or a full prefill/decode pair"
                raise StartFailed(
                    f"not ready after {waited_s:.0f} s: {names}; logs are in {self._run_dir}/logs"
                )
            if now_s >= next_progress_s:
                next_progress_s = now_s + PROGRESS_INTERVAL_S
                for name, child in loading.items():
                    self._say(f"{name}: {progress_line(child.log_text())}")
            dead = processes.wait_for_any_exit(self._children.values(), LOOK_INTERVAL_S)
            if dead is not None:
                raise self._death(dead)

    def _death(self, dead: RecordedProcess) -> StartFailed:
        name = next(name for name, child in self._children.items() if child is dead)
        status = dead.exit_status()
        how = (
            "ended" if status is None else f"exited with {status}" if status >= 0 else f"killed by {-status}"
        )
        return StartFailed(f"{name} {how}; the end of {dead.log}:\n{dead.log_tail()}")

    # ── talking ──────────────────────────────────────────────────────────────────────────────

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started_s:6.1f} s  {text}", flush=True)

    def _print_usage(self, ports: Ports, http: FleetHttp) -> None:
        model = shortest_name(http.get("/v1/models"))
        host = reachable_host(self._settings.host)
        print(usage_text(model, _url(host, ports.http), f"{host}:{ports.client}"), flush=True)


def usage_text(model: str, url: str, client_address: str) -> str:
    """Three ways to call the fleet, each one paste away."""
    python = _shown_path(Path(sys.executable))
    baton = _shown_path(Path(sys.executable).with_name("baton"))
    return f"""
ready: {url}  (Ctrl-C drains and stops)

  curl {url}/v1/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": 32}}'

  {python} -c 'from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
messages = [{{"role": "user", "content": "Once upon a time"}}]
answer = client.chat.completions.create(model="{model}", messages=messages, max_tokens=32)
print(answer.choices[0].message.content)'

  {baton} submit --address {client_address} --max-tokens 32 "Once upon a time"
"""


def progress_line(log: str) -> str:
    """What a process last said at level info or above, short enough for one line."""
    said = LOG_LINE.findall(log)
    line = said[-1].strip() if said else "importing its packages"
    return line if len(line) <= MAX_PROGRESS_CHARS else line[: MAX_PROGRESS_CHARS - 1] + "…"


def shortest_name(models: dict[str, Any]) -> str:
    """A local model is served under its path and under its last component; the short one reads better."""
    return min((str(card["id"]) for card in models["data"]), key=len)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _shown_path(path: Path) -> str:
    """Relative where that is shorter: people start this from the checkout."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
