"""Long-lived child processes: started in a session of their own, recorded on disk, stopped by record.

    python -m baton.launch.processes start --record FILE --log FILE -- COMMAND...
    python -m baton.launch.processes wait  --line TEXT --timeout-s S RECORD...
    python -m baton.launch.processes stop  --timeout-s S RECORD...

The fleet scripts and the launcher share this. A record is a JSON file with the pid, its start time
and the command. The start time keeps a recycled pid from being stopped in another's place. The
session (`setsid`) keeps a terminal's Ctrl-C away from the children, and it is how their own
children, the engines, are found again: also after the recorded process itself has died.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.process_guard import ProcessIdentity

POLL_INTERVAL_S = 0.1
"""Between two looks at a log or at /proc; an exit itself is an event (pidfd), not a poll."""

KILL_TIMEOUT_S = 10.0
"""A killed process of several gigabytes needs a moment to give its memory back."""

LOG_TAIL_LINES = 25


@dataclass(frozen=True, slots=True)
class RecordedProcess:
    """A process we started, and the processes it started."""

    identity: ProcessIdentity
    command: list[str]
    log: Path

    @property
    def pid(self) -> int:
        return self.identity.pid

    def is_alive(self) -> bool:
        return self.identity.is_alive()

    def members(self) -> list[int]:
        """Living pids of its session. Empty too if the pid now belongs to somebody else."""
        leader_ticks = _start_ticks(self.pid)
        if leader_ticks is not None and leader_ticks != self.identity.start_ticks:
            return []
        return [
            pid
            for pid, session, start_ticks in _living()
            if session == self.pid and start_ticks >= self.identity.start_ticks
        ]

    def exit_status(self) -> int | None:
        """Of a dead child of this process: exit code, or minus the signal. None if not known."""
        # Dead by its first thread may be a moment before the kernel has ended the others and tells.
        patience = os.WNOHANG if self.is_alive() else 0
        try:
            result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | patience)
        except ChildProcessError:
            return None
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def terminate(self) -> None:
        """Ask for an orderly end: only the process itself, which knows what to do with its engine."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Everything of the session, at once."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def log_text(self) -> str:
        try:
            return self.log.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return f"(no log: {error})"

    def log_tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])

    def save(self, path: Path) -> None:
        fields = {**self.identity.to_dict(), "command": self.command, "log": str(self.log)}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(fields) + "\n", encoding="utf-8")
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> RecordedProcess:
        """Raises ValueError naming a file that is not a record."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(ProcessIdentity.from_dict(fields), list(fields["command"]), Path(fields["log"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a record of a process: {error}") from error


def start(command: list[str], log: Path, env: Mapping[str, str] | None = None) -> RecordedProcess:
    """`env` is added to this process's own. The log is started afresh."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **env} if env else None,
        )
    # The exit is looked up in /proc; leaving the zombie unreaped keeps its pid from being reused.
    process.returncode = 0
    return RecordedProcess(_identity_of_child(process.pid), command, log)


def wait_for_exit(processes: Iterable[RecordedProcess], timeout_s: float, wake_fd: int | None = None) -> bool:
    """Until all are dead (True), or the time is over or `wake_fd` becomes readable (False)."""
    deadline_s = time.monotonic() + timeout_s
    for process in processes:
        while process.is_alive():
            if not _wait_for_one(process, deadline_s, wake_fd):
                return False
    return True


def wait_for_any_exit(
    processes: Iterable[RecordedProcess], timeout_s: float, wake_fd: int | None = None
) -> RecordedProcess | None:
    """The first found dead; None when the time is over or `wake_fd` became readable before."""
    watched = list(processes)
    with contextlib.ExitStack() as stack:
        pidfds = []
        for process in watched:
            if not process.is_alive():
                return process
            with contextlib.suppress(OSError):  # gone this moment, or a kernel without pidfd
                pidfd = os.pidfd_open(process.pid)
                stack.callback(os.close, pidfd)
                pidfds.append(pidfd)
        select.select([*pidfds, *([] if wake_fd is None else [wake_fd])], [], [], timeout_s)
    return next((process for process in watched if not process.is_alive()), None)


def wait_until_empty(processes: Iterable[RecordedProcess], timeout_s: float) -> bool:
    """Until no process of any of the sessions is left."""
    deadline_s = time.monotonic() + timeout_s
    remaining = list(processes)
    while remaining := [process for process in remaining if process.members()]:
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def stop(processes: list[RecordedProcess], timeout_s: float) -> bool:
    """SIGTERM to each, SIGKILL to what is left of their sessions after `timeout_s`. False: something
    survived even that."""
    for process in processes:
        process.terminate()
    wait_for_exit(processes, timeout_s)
    for process in processes:
        process.kill()
    return wait_until_empty(processes, KILL_TIMEOUT_S)


def _wait_for_one(process: RecordedProcess, deadline_s: float, wake_fd: int | None) -> bool:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        return False
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        # Gone, or a kernel without pidfd: the caller looks again.
        time.sleep(min(POLL_INTERVAL_S, left_s))
        return True
    try:
        readable, _, _ = select.select([pidfd, *([] if wake_fd is None else [wake_fd])], [], [], left_s)
    finally:
        os.close(pidfd)
    return pidfd in readable


def _identity_of_child(pid: int) -> ProcessIdentity:
    """Also if it has died already: a child that is not reaped still has its start time."""
    ticks = _start_ticks(pid)
    assert ticks is not None, pid
    return ProcessIdentity(pid=pid, start_ticks=ticks)


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()


def _start_ticks(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def _living() -> Iterable[tuple[int, int, int]]:
    """(pid, session, start ticks) of every process that is not a zombie."""
    for entry in os.listdir("/proc"):
        fields = _stat(int(entry)) if entry.isdigit() else None
        if fields is not None and fields[0] not in "ZX":
            yield int(entry), int(fields[3]), int(fields[19])


# ── the command line that the fleet scripts use ────────────────────────────────────────────────


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m baton.launch.processes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("start")
    starting.add_argument("--record", type=Path, required=True)
    starting.add_argument("--log", type=Path, required=True)
    starting.add_argument("argv", nargs="+")
    waiting = commands.add_parser("wait")
    waiting.add_argument("--line", required=True, help="text that a ready process has written to its log")
    stopping = commands.add_parser("stop")
    for sub in (waiting, stopping):
        sub.add_argument("--timeout-s", type=float, required=True)
        sub.add_argument("records", nargs="+", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "start":
        return _start_recorded(arguments.record, arguments.log, arguments.argv)
    try:
        processes = {path: RecordedProcess.load(path) for path in arguments.records}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.command == "wait":
        return _wait_for_line(processes, arguments.line, arguments.timeout_s)
    return _stop_recorded(processes, arguments.timeout_s)


def _start_recorded(record: Path, log: Path, command: list[str]) -> int:
    record.parent.mkdir(parents=True, exist_ok=True)
    if record.exists() and RecordedProcess.load(record).members():
        print(f"{record} is in use: {record.stem} is running; stop it first", file=sys.stderr)
        return 1
    print(f"+ {shlex.join(command)}  # log: {log}", flush=True)
    start(command, log).save(record)
    return 0


def _wait_for_line(processes: dict[Path, RecordedProcess], line: str, timeout_s: float) -> int:
    started_s = time.monotonic()
    waiting = dict(processes)
    while waiting:
        for path, process in list(waiting.items()):
            # Liveness first: a process that wrote its line and died is dead.
            is_alive = process.is_alive()
            elapsed_s = time.monotonic() - started_s
            if not is_alive or elapsed_s > timeout_s:
                problem = "is not ready" if is_alive else "ended"
                print(f"{path.stem} {problem} after {elapsed_s:.0f} s; the end of {process.log}:\n"
                      f"{process.log_tail()}", file=sys.stderr)  # fmt: skip
                return 1
            if line in process.log_text():
                print(f"{path.stem} ready after {elapsed_s:.1f} s (pid {process.pid})", flush=True)
                del waiting[path]
        if waiting:
            wait_for_exit(waiting.values(), POLL_INTERVAL_S)
    return 0


def _stop_recorded(processes: dict[Path, RecordedProcess], timeout_s: float) -> int:
    started_s = time.monotonic()
    is_clean = stop(list(processes.values()), timeout_s)
    for path, process in processes.items():
        left = process.members()
        if left:
            print(f"{path.stem}: still running after SIGKILL: {left}", file=sys.stderr)
        else:
            path.unlink(missing_ok=True)
            print(f"{path.stem} stopped after {time.monotonic() - started_s:.1f} s (pid {process.pid})")
    return 0 if is_clean else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
