"""CPU seconds of process trees, and how busy the machine is, from /proc.

A process's user and system time come in ticks of 10 ms (rounded from exact run time by the
kernel), so runs must be long enough for the rounding not to matter: one second of CPU is 1 %.
Threads are included by the kernel; children are found by their parent's number, and those that
ended and were waited for are in their parent's "children" times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    pid: int
    parent: int
    ticks: int
    """User + system, of the process and of the children it waited for."""


def parse_stat(text: str) -> ProcessTimes:
    """One line of /proc/PID/stat. The command, in parentheses, may itself hold `) (` and spaces."""
    pid, _, rest = text.partition(" ")
    fields = rest[rest.rindex(")") + 2 :].split()
    # After the command: state, ppid, ...; utime stime cutime cstime are fields 14-17 counted from 1.
    return ProcessTimes(int(pid), int(fields[1]), sum(int(fields[i]) for i in (11, 12, 13, 14)))


def snapshot(proc: Path = PROC) -> dict[int, ProcessTimes]:
    found = {}
    for entry in os.scandir(proc):
        if entry.name.isdigit():
            try:
                times = parse_stat((proc / entry.name / "stat").read_text(encoding="utf-8", errors="replace"))
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[times.pid] = times
    return found


def tree_seconds(roots: Iterable[int], processes: dict[int, ProcessTimes]) -> float:
    """CPU seconds of the processes in `roots` and of all that descend from them."""
    children: dict[int, list[int]] = {}
    for times in processes.values():
        children.setdefault(times.parent, []).append(times.pid)
    pending, members = list(roots), set()
    while pending:
        pid = pending.pop()
        if pid in processes and pid not in members:
            members.add(pid)
            pending += children.get(pid, [])
    return sum(processes[pid].ticks for pid in members) / TICKS_PER_S


@dataclass(frozen=True, slots=True)
class MachineTimes:
    busy: int
    total: int

    @classmethod
    def read(cls, proc: Path = PROC) -> MachineTimes:
        line = (proc / "stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
        # cpu user nice system idle iowait irq softirq steal; guest times are inside user already.
        values = [int(value) for value in line[1:9]]
        return cls(busy=sum(values) - values[3] - values[4], total=sum(values))


def busy_cores(before: MachineTimes, after: MachineTimes) -> float:
    """Cores in use by anybody between two readings; 0.0 on an idle machine."""
    total = after.total - before.total
    return (os.cpu_count() or 1) * (after.busy - before.busy) / total if total else 0.0


def quiet_check(seconds: float = 0.6) -> float:
    """Cores in use right now. Everything under test is up and idle while this looks."""
    before = MachineTimes.read()
    time.sleep(seconds)
    return busy_cores(before, MachineTimes.read())
