"""One run: a fleet, its users, what is done to it, then quiet, then the rules. Imported, not collected."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from baton.history import (
    End,
    History,
    Limits,
    RunWriter,
    Violation,
    check,
    read_run,
    story,
    what_is_held,
)
from baton.history.checker import longest_silence_s
from baton.history.history_command import MAX_SHOWN, MAX_STORIES
from tests.chaos.client import Job
from tests.chaos.supervisor import Disturbance, Supervised
from tests.chaos.users import Done, Users
from tests.system.fleet import Fleet

SNAPSHOT_INTERVAL_S = 2.0
QUIET_GRACE_S = 10.0
"""Beyond the lease: what a killed peer left is given back when its death is noticed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    num_users: int
    """Requests in flight, but for what waits to be asked again."""
    load_s: float
    """How long users begin new jobs."""
    ramp_s: float = 0.0
    think_s: float = 0.0
    """A user's pause between an answer and the next job."""
    disturbances: Iterable[Disturbance] = ()
    """As many of them as the load lasts for."""
    waits_for_recovery: bool = False
    """The time to the next one counts from when the whole fleet is back; for engines that take longer to
    start. The load then ends with the last of them, or after `load_s`."""


@dataclass(slots=True)
class Run:
    """What came of it."""

    done: list[Done]
    most_in_flight: int
    load_s: float
    quiet_after_s: float | None
    """How long the fleet held something after the last request; None: it still does."""
    num_workers_back: int
    """Registered in the end."""
    history: History
    violations: list[Violation]
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)
    """(seconds into the load, resident memory of the coordinator)"""

    @property
    def num_answered(self) -> int:
        return sum(done.last in (End.COMPLETED, End.LEFT) for done in self.done)

    def told(self, folder: Path) -> str:
        """The violations, and the stories of the first requests that have one."""
        whose = dict.fromkeys(v.request_id for v in self.violations if v.request_id is not None)
        stories = [story(folder, request_id) for request_id in list(whose)[:MAX_STORIES]]
        return "\n\n".join(["\n".join(map(str, self.violations[:MAX_SHOWN])), *stories])


class _Watcher:
    """Looks at the fleet while it works."""

    def __init__(self, fleet: Fleet, writer: RunWriter) -> None:
        self.rss_bytes: list[tuple[float, int]] = []
        self._fleet = fleet
        self._writer = writer
        self._start_s = time.monotonic()

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_INTERVAL_S)
            with suppress(OSError, ValueError):  # no coordinator at this moment
                self._writer.snapshot(await asyncio.to_thread(self._fleet.snapshot))
            if (coordinator := self._fleet.members.get("coordinator")) is not None:
                with suppress(OSError):
                    self.rss_bytes.append((time.monotonic() - self._start_s, resident_bytes(coordinator.pid)))


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {pid} is gone")


def run(
    supervised: Supervised, writer: RunWriter, limits: Limits, load: Load, next_job: Callable[[], Job]
) -> Run:
    """The fleet is up and idle; it is stopped, and the run read back and checked, when this returns."""
    fleet = supervised.fleet
    writer.note(limits)
    users = Users(fleet.http_port, writer, next_job, timeout_s=longest_silence_s(limits))
    watcher = _Watcher(fleet, writer)
    started_s = time.monotonic()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_load(supervised, users, watcher, load))
        load_s = time.monotonic() - started_s
        with suppress(AssertionError):  # who does not come back is missing in the end
            supervised.wait_until_whole()
        quiet_after_s = _wait_until_quiet(fleet, limits.lease_s + QUIET_GRACE_S)
        num_workers_back = len(fleet.workers())
        writer.snapshot(fleet.snapshot(), is_quiet=True)
    finally:
        writer.close()
        fleet.stop()
    history = read_run(fleet.folder)
    return Run(
        done=users.done,
        most_in_flight=users.most_in_flight,
        load_s=load_s,
        quiet_after_s=quiet_after_s,
        num_workers_back=num_workers_back,
        history=history,
        violations=check(history),
        rss_bytes=watcher.rss_bytes,
    )


async def _load(supervised: Supervised, users: Users, watcher: _Watcher, load: Load) -> None:
    end_s = time.monotonic() + load.load_s
    disturbing = asyncio.create_task(asyncio.to_thread(_disturb, supervised, load, end_s))
    watching = asyncio.create_task(watcher.watch())

    def is_over() -> bool:
        return disturbing.done() if load.waits_for_recovery else time.monotonic() >= end_s

    try:
        await users.run(load.num_users, is_over, ramp_s=load.ramp_s, think_s=load.think_s)
        await disturbing
    finally:
        watching.cancel()


def _disturb(supervised: Supervised, load: Load, end_s: float) -> None:
    due_s = time.monotonic()
    for disturbance in load.disturbances:
        due_s += disturbance.after_s
        if due_s >= end_s:
            return
        time.sleep(max(0.0, due_s - time.monotonic()))
        supervised.disturb(disturbance)
        if load.waits_for_recovery:
            supervised.wait_until_whole()
            due_s = time.monotonic()


def _wait_until_quiet(fleet: Fleet, timeout_s: float) -> float | None:
    started_s = time.monotonic()
    while what_is_held(fleet.snapshot()):
        if time.monotonic() - started_s > timeout_s:
            return None
        time.sleep(0.1)
    return time.monotonic() - started_s
